// Matrix entropy of query heads, many tokens at a time: one SIMD lane a token, no branches on data.
//
//   Gram matrix of the centred heads -> unit trace -> Householder tridiagonalisation -> entropy.
//
// float32 up to the tridiagonal matrix, where rounding costs 1e-7 of the trace; double from there.
// No eigenvalue is computed: x ln x is a sum of poles (ep_core/kernels/rational.py), and the trace
// of a pole's resolvent follows from the pivots of an LDL' factorisation.
//
// What float32 cannot hold (numbers near its limits, a mean far larger than the spread, a head
// almost at the mean) is noticed in the Gram matrix and computed again in double, token by token.

#include <cmath>
#include <cstdlib>
#include <new>

#include "simd.h"
#include "threads.h"

namespace {

enum Normalize : int { NONE = 0, ROWS_TO_UNIT = 1, UNIT_TRACE = 2 };

// x ln x ~ linear x + square x^2 + sum_j weight_j x / (x + pole_j) on [0, 1]
struct Rational {
    double linear, square;
    int64_t poles;
    const double *pole, *weight;
};

struct Queries {
    const char* data;
    int64_t tokens, heads, width;
    int64_t token_stride, head_stride;  // in elements; those of the width are adjacent
    Normalize normalize;
};

constexpr int BLOCK = 4;        // columns of the Gram product in registers, ROWS x BLOCK
constexpr float TINY = 1e-30f;  // of squares of numbers relative to a trace of 1: below is zero

// where float32 is trusted; outside a token goes through double
constexpr float SMALLEST_TRACE = 1e-20f;
constexpr float SMALLEST_CENTRED = 0.25f;    // of the trace before the last centring
constexpr float SMALLEST_ROW = 1.0f / 256;   // of the mean row, squared norms

inline int64_t at(int64_t row, int64_t column) { return row * (row + 1) / 2 + column; }

inline int64_t padded(int64_t heads) { return (heads + BLOCK - 1) / BLOCK * BLOCK; }

// Working memory of one thread.
struct Scratch {
    vec* slice;      // [padded heads][LANES]: LANES columns of the queries of LANES tokens
    vec* gram;       // lower triangle, packed by rows
    vec *v, *w, *p;  // [heads]
    vec *next;       // [heads]
    dvec *diagonal, *beside;  // [heads][2]: the tridiagonal matrix, off-diagonals squared
    double* centred;          // [heads][width], one token
    void* memory;

    Scratch(int64_t heads, int64_t width) {
        const int64_t rows = padded(heads);
        const int64_t vectors = rows * LANES + at(rows, 0) + 4 * heads + 4 * heads;
        memory = std::malloc(vectors * sizeof(vec) + heads * width * sizeof(double) + sizeof(vec));
        if (!memory) return;
        const uintptr_t start = (reinterpret_cast<uintptr_t>(memory) + sizeof(vec) - 1) &
                                ~uintptr_t(sizeof(vec) - 1);
        slice = reinterpret_cast<vec*>(start);
        gram = slice + rows * LANES;
        v = gram + at(rows, 0);
        w = v + heads;
        p = w + heads;
        next = p + heads;
        diagonal = reinterpret_cast<dvec*>(next + heads);
        beside = diagonal + 2 * heads;
        centred = reinterpret_cast<double*>(beside + 2 * heads);
    }
    ~Scratch() { std::free(memory); }
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;
};

template <Format F>
inline const typename Stored<F>::type* row_of(const Queries& q, int64_t token, int64_t head) {
    return reinterpret_cast<const typename Stored<F>::type*>(q.data) + token * q.token_stride +
           head * q.head_stride;
}

// LANES columns from `column` on of every head of LANES tokens, lanes = tokens, heads centred.
template <Format F>
void load_slice(const Queries& q, const int64_t (&tokens)[LANES], int64_t column, Scratch& s) {
    typedef typename Stored<F>::type stored;
    const int64_t left = q.width - column;
    stored padded[LANES][LANES] = {};
    vec sum[LANES] = {};
    for (int64_t head = 0; head < q.heads; ++head) {
        const stored* rows[LANES];
        for (int lane = 0; lane < LANES; ++lane) {
            rows[lane] = row_of<F>(q, tokens[lane], head) + column;
            __builtin_prefetch(rows[lane] + LANES * q.token_stride, 0, 2);  // the next tokens
            if (left < LANES) {  // nothing is read past the end of a row
                std::memcpy(padded[lane], rows[lane], left * sizeof(stored));
                rows[lane] = padded[lane];
            }
        }
        vec* to = s.slice + head * LANES;
        gather<F>(rows, to);
        for (int i = 0; i < LANES; ++i) sum[i] += to[i];
    }
    const float share = 1.0f / float(q.heads);
    for (int i = 0; i < LANES; ++i) sum[i] *= share;
    for (int64_t head = 0; head < q.heads; ++head)
        for (int i = 0; i < LANES; ++i) s.slice[head * LANES + i] -= sum[i];
}

// gram += slice slice', lower triangle
void add_products(int64_t rows, Scratch& s) {
    for (int64_t i = 0; i < rows; i += ROWS)
        for (int64_t j = 0; j <= i; j += BLOCK) {
            vec sum[ROWS][BLOCK] = {};
            const vec *left = s.slice + i * LANES, *right = s.slice + j * LANES;
#pragma GCC unroll 1  // unrolled, the sums would not stay in registers
            for (int d = 0; d < LANES; ++d)
                for (int r = 0; r < ROWS; ++r)
                    for (int c = 0; c < BLOCK; ++c)
                        sum[r][c] += left[r * LANES + d] * right[c * LANES + d];
            for (int r = 0; r < ROWS; ++r)
                for (int c = 0; c < BLOCK; ++c)
                    if (j + c <= i + r) s.gram[at(i + r, j + c)] += sum[r][c];
        }
}

// Take the mean over heads that rounding left out of the Gram matrix: A - m 1' - 1 m' + mean(m).
void centre(int64_t heads, Scratch& s) {
    vec* mean = s.p;
    for (int64_t i = 0; i < heads; ++i) mean[i] = vec{};
    for (int64_t i = 0; i < heads; ++i) {
        const vec* row = s.gram + at(i, 0);
        vec sum = vec{};
        for (int64_t j = 0; j < i; ++j) {
            sum += row[j];
            mean[j] += row[j];
        }
        mean[i] += sum + row[i];
    }
    const float share = 1.0f / float(heads);
    vec total = vec{};
    for (int64_t i = 0; i < heads; ++i) {
        mean[i] *= share;
        total += mean[i];
    }
    total *= 0.5f * share;
    for (int64_t i = 0; i < heads; ++i) mean[i] -= total;
    for (int64_t i = 0; i < heads; ++i) {
        vec* row = s.gram + at(i, 0);
        for (int64_t j = 0; j <= i; ++j) row[j] -= mean[i] + mean[j];
    }
}

vec trace_of(int64_t heads, const vec* gram) {
    vec sum = vec{};
    for (int64_t i = 0; i < heads; ++i) sum += gram[at(i, i)];
    return sum;
}

// Gram matrices of LANES tokens at unit trace, and their traces; lanes not to be trusted are marked.
template <Format F>
ivec gram_of_lanes(const Queries& q, const int64_t (&tokens)[LANES], Scratch& s,
                   double (&trace)[LANES]) {
    const int64_t heads = q.heads, rows = padded(heads);
    // the padding's products are not read; they should be defined all the same
    for (int64_t i = heads * LANES; i < rows * LANES; ++i) s.slice[i] = vec{};
    for (int64_t i = 0; i < at(rows, 0); ++i) s.gram[i] = vec{};
    for (int64_t column = 0; column < q.width; column += LANES) {
        load_slice<F>(q, tokens, column, s);
        add_products(rows, s);
    }
    const vec before = trace_of(heads, s.gram);
    centre(heads, s);
    vec sum = trace_of(heads, s.gram);
    // infinity and NaN compare false
    ivec good = (sum > SMALLEST_TRACE) & (sum > SMALLEST_CENTRED * before);
    if (q.normalize == ROWS_TO_UNIT) {
        const vec smallest = sum * (SMALLEST_ROW / float(heads));
        for (int64_t i = 0; i < heads; ++i) {
            const vec square = s.gram[at(i, i)];
            good &= square > smallest;
            s.w[i] = 1.0f / square_root(square);
        }
        for (int64_t i = 0; i < heads; ++i)
            for (int64_t j = 0; j <= i; ++j) s.gram[at(i, j)] *= s.w[i] * s.w[j];
        sum = trace_of(heads, s.gram);
    }
    const vec scale = 1.0f / sum;
    for (int64_t i = 0; i < at(heads, 0); ++i) s.gram[i] *= scale;
    for (int lane = 0; lane < LANES; ++lane) trace[lane] = double(sum[lane]) / double(heads);
    return ~good;
}

// The same of one token, in double.
template <Format F>
double gram_of_one(const Queries& q, int64_t token, int lane, Scratch& s) {
    const int64_t heads = q.heads, width = q.width;
    for (int64_t head = 0; head < heads; ++head)
        for (int64_t d = 0; d < width; ++d)
            s.centred[head * width + d] = widen<F>(row_of<F>(q, token, head)[d]);
    for (int64_t d = 0; d < width; ++d) {
        double mean = 0;
        for (int64_t head = 0; head < heads; ++head) mean += s.centred[head * width + d];
        mean /= double(heads);
        for (int64_t head = 0; head < heads; ++head) s.centred[head * width + d] -= mean;
    }
    double trace = 0;
    for (int64_t head = 0; head < heads; ++head) {
        double* row = s.centred + head * width;
        double square = 0;
        for (int64_t d = 0; d < width; ++d) square += row[d] * row[d];
        if (q.normalize == ROWS_TO_UNIT && square != 0) {  // a NaN stays one
            const double norm = std::sqrt(square);
            for (int64_t d = 0; d < width; ++d) row[d] /= norm;
            square = square / norm / norm;
        }
        trace += square;
    }
    const bool usable = std::isfinite(trace) && trace > 0;
    for (int64_t i = 0; i < heads; ++i)
        for (int64_t j = 0; j <= i; ++j) {
            double sum = 0;
            const double *left = s.centred + i * width, *right = s.centred + j * width;
            if (usable)
                for (int64_t d = 0; d < width; ++d) sum += left[d] * right[d];
            s.gram[at(i, j)][lane] = usable ? float(sum / trace) : 0.0f;
        }
    return trace / double(heads);
}

// A symmetric matrix (packed lower triangle, trace 1) to tridiagonal form by Householder reflections
// I - tau v v', from the last row up. A <- A - v w' - w v' of one step and A v of the next share one
// pass over A, which is what the time goes into.
void tridiagonalise(int64_t heads, Scratch& s, vec* diagonal, vec* beside) {
    vec *v = s.v, *w = s.w, *p = s.p, *next = s.next, *gram = s.gram;
    for (int64_t i = 0; i < heads; ++i) v[i] = w[i] = vec{};
    for (int64_t m = heads - 1; m >= 1; --m) {  // row m against columns 0 .. m-1
        vec* last = gram + at(m, 0);
        for (int64_t j = 0; j <= m; ++j) last[j] -= v[m] * w[j] + w[m] * v[j];
        diagonal[m] = last[m];

        vec squares = vec{};
        for (int64_t j = 0; j < m - 1; ++j) squares += last[j] * last[j];
        const vec alpha = last[m - 1], squared = alpha * alpha + squares;
        const vec norm = square_root(squared);
        const ivec turn = squares > TINY;
        beside[m - 1] = squared;
        const vec beta = alpha > 0.0f ? -norm : norm;
        const vec length = norm * (norm + (alpha > 0.0f ? alpha : -alpha));
        const vec tau = turn ? 1.0f / (turn ? length : splat(1.0f)) : vec{};
        for (int64_t j = 0; j < m - 1; ++j) next[j] = last[j];
        next[m - 1] = alpha - beta;

        for (int64_t j = 0; j < m; ++j) p[j] = vec{};
        int64_t i = 0;
        for (; i + ROWS <= m; i += ROWS) {
            vec sum[ROWS] = {}, vi[ROWS], wi[ROWS], ni[ROWS];
            for (int r = 0; r < ROWS; ++r) {
                vi[r] = v[i + r];
                wi[r] = w[i + r];
                ni[r] = next[i + r];
            }
            vec* row[ROWS];
            for (int r = 0; r < ROWS; ++r) row[r] = gram + at(i + r, 0);
            for (int64_t j = 0; j < i; ++j) {
                const vec vj = v[j], wj = w[j], nj = next[j];
                vec pj = p[j];
                for (int r = 0; r < ROWS; ++r) {
                    const vec a = row[r][j] - vi[r] * wj - wi[r] * vj;
                    row[r][j] = a;
                    sum[r] += a * nj;
                    pj += a * ni[r];
                }
                p[j] = pj;
            }
            for (int r = 0; r < ROWS; ++r) {
                for (int c = 0; c <= r; ++c) {
                    const vec a = row[r][i + c] - vi[r] * w[i + c] - wi[r] * v[i + c];
                    row[r][i + c] = a;
                    sum[r] += a * ni[c];
                    if (c < r) p[i + c] += a * ni[r];
                }
                p[i + r] += sum[r];
            }
        }
        for (; i < m; ++i) {
            vec* row = gram + at(i, 0);
            vec sum = vec{};
            for (int64_t j = 0; j <= i; ++j) {
                const vec a = row[j] - v[i] * w[j] - w[i] * v[j];
                row[j] = a;
                sum += a * next[j];
                if (j < i) p[j] += a * next[i];
            }
            p[i] += sum;
        }
        vec projection = vec{};
        for (int64_t j = 0; j < m; ++j) {
            p[j] *= tau;
            projection += p[j] * next[j];
        }
        projection *= 0.5f * tau;
        for (int64_t j = 0; j < m; ++j) {
            w[j] = p[j] - projection * next[j];
            v[j] = next[j];
        }
    }
    diagonal[0] = gram[0] - 2.0f * v[0] * w[0];
}

// -tr(T ln T) of tridiagonal matrices with eigenvalues in [0, 1].
//
// tr (T + t)^-1 is the derivative by t of ln det(T + t) = sum_i ln d_i with the pivots
// d_i = a_i + t - b_i^2 / d_(i-1). For T >= 0 each d_i >= t and each d_i'/d_i <= 1/t. Rounding can
// leave T slightly indefinite; enforcing both counts such an eigenvalue as zero.
dvec entropy(int64_t heads, const Rational& f, const dvec* a, const dvec* b, int half) {
    constexpr int TOGETHER = 4;  // poles in flight: divisions take long
    dvec trace = dvec{}, squares = dvec{};
    for (int64_t i = 0; i < heads; ++i) {
        const dvec ai = a[2 * i + half];
        trace += ai;
        squares += ai * ai;
        if (i) squares += 2.0 * b[2 * (i - 1) + half];
    }
    dvec sum = f.linear * trace + f.square * squares;
    for (int64_t first = 0; first < f.poles; first += TOGETHER) {
        dvec pole[TOGETHER], limit[TOGETHER], inverse[TOGETHER], slope[TOGETHER],
            resolvent[TOGETHER];
        double weight[TOGETHER];
        for (int u = 0; u < TOGETHER; ++u) {
            const bool there = first + u < f.poles;
            pole[u] = splat_double(there ? f.pole[first + u] : 1.0);
            limit[u] = 1.0 / pole[u];
            weight[u] = there ? f.weight[first + u] : 0.0;
            const dvec pivot = a[half] + pole[u];
            inverse[u] = 1.0 / (pivot > pole[u] ? pivot : pole[u]);
            slope[u] = resolvent[u] = inverse[u];
        }
        for (int64_t i = 1; i < heads; ++i) {
            const dvec ai = a[2 * i + half], bi = b[2 * (i - 1) + half];
            for (int u = 0; u < TOGETHER; ++u) {
                const dvec ratio = bi * inverse[u];
                const dvec pivot = ai + pole[u] - ratio;
                inverse[u] = 1.0 / (pivot > pole[u] ? pivot : pole[u]);
                const dvec slopes = (1.0 + ratio * slope[u]) * inverse[u];  // d'/d
                slope[u] = slopes < limit[u] ? slopes : limit[u];
                resolvent[u] += slope[u];
            }
        }
        for (int u = 0; u < TOGETHER; ++u)
            sum += weight[u] * (double(heads) - pole[u] * resolvent[u]);
    }
    return -sum;
}

// Scores of the tokens from `first` on, at most LANES.
template <Format F>
void score_lanes(const Queries& q, const Rational& f, int64_t first, float* out, Scratch& s) {
    const int64_t count = q.tokens - first < LANES ? q.tokens - first : LANES;
    int64_t tokens[LANES];
    for (int lane = 0; lane < LANES; ++lane) tokens[lane] = first + (lane < count ? lane : 0);
    double trace[LANES];
    const ivec again = gram_of_lanes<F>(q, tokens, s, trace);
    for (int lane = 0; lane < LANES; ++lane) {
        if (again[lane]) trace[lane] = gram_of_one<F>(q, tokens[lane], lane, s);
    }

    vec *diagonal = s.slice, *beside = s.slice + q.heads;  // the slice is free: LANES >= 2
    tridiagonalise(q.heads, s, diagonal, beside);
    for (int64_t i = 0; i < q.heads; ++i)
        for (int lane = 0; lane < LANES; ++lane) {
            s.diagonal[2 * i + lane / HALF][lane % HALF] = diagonal[i][lane];
            if (i + 1 < q.heads) s.beside[2 * i + lane / HALF][lane % HALF] = beside[i][lane];
        }
    const dvec halves[2] = {entropy(q.heads, f, s.diagonal, s.beside, 0),
                            entropy(q.heads, f, s.diagonal, s.beside, 1)};
    const double top = std::log(double(q.heads));
    for (int lane = 0; lane < count; ++lane) {
        const double t = trace[lane];
        double score = halves[lane / HALF][lane % HALF];  // S of A / t; S(A) = t S(A / t) - t ln t
        if (!std::isfinite(t))
            score = -INFINITY;
        else if (t == 0)
            score = 0;
        else if (q.normalize != UNIT_TRACE)
            score = t * (score - std::log(t));
        out[first + lane] = float(score / top);
    }
}

template <Format F>
int score_all(const Queries& q, const Rational& f, int64_t threads, float* out) {
    const int64_t tiles = (q.tokens + LANES - 1) / LANES;
    return share_work(tiles, threads, [&](int64_t begin, int64_t end) {
        Scratch s(q.heads, q.width);
        if (!s.memory) return false;
        for (int64_t tile = begin; tile < end; ++tile) score_lanes<F>(q, f, tile * LANES, out, s);
        return true;
    });
}

}  // namespace

// Scores [tokens] of queries [tokens, heads, width]; strides in elements. 0, or 1 without memory.
extern "C" int ep_matrix_entropy(const void* data, int format, int64_t tokens, int64_t heads,
                                 int64_t width, int64_t token_stride, int64_t head_stride,
                                 int normalize, const double* rational, int64_t poles,
                                 int64_t threads, float* out) {
    const Queries q{static_cast<const char*>(data), tokens,      heads,
                    width,                          token_stride, head_stride,
                    Normalize(normalize)};
    const Rational f{rational[0], rational[1], poles, rational + 2, rational + 2 + poles};
    switch (format) {
        case BFLOAT16: return score_all<BFLOAT16>(q, f, threads, out);
        case FLOAT16: return score_all<FLOAT16>(q, f, threads, out);
        default: return score_all<FLOAT32>(q, f, threads, out);
    }
}
