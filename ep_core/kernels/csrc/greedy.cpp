// The greedy maximiser of a set's Renyi-2 matrix entropy, from the Gram matrix of the directions.
//
// Squared cosines are integers in units of 2^-40, held in double: sums of up to 2^13 of them are
// exact, so no order of summation moves a pick.

#include <cfloat>
#include <cmath>
#include <cstdlib>

#include "simd.h"

namespace {

typedef float half_vec __attribute__((vector_size(4 * HALF)));

// Squared cosines in units of 2^-40, rounded to even; NaN, of a token without direction, is 0.
inline dvec similarity(const float* cosines) {
    half_vec stored;
    std::memcpy(&stored, cosines, sizeof stored);
    const dvec cosine = __builtin_convertvector(stored, dvec);
    const dvec square = cosine * cosine * 0x1p40;
    return cosine == cosine ? (square + 0x1p52) - 0x1p52 : dvec{};
}

// Calls use(index, similarities) for each HALF columns of a row, zeros behind the last column.
template <class Use>
inline void for_row(const float* row, int64_t n, const Use& use) {
    int64_t j = 0;
    for (; j + HALF <= n; j += HALF) use(j / HALF, similarity(row + j));
    if (j < n) {
        float padded[HALF] = {};
        std::memcpy(padded, row + j, (n - j) * sizeof(float));
        use(j / HALF, similarity(padded));
    }
}

}  // namespace

// k ascending indices from a Gram matrix [n, n], row stride in elements. 0, or 1 without memory.
extern "C" int ep_greedy_renyi2(const float* gram, int64_t n, int64_t stride, int64_t k,
                                int64_t* kept) {
    const int64_t vectors = (n + HALF - 1) / HALF;
    void* memory = std::malloc((vectors + 1) * sizeof(dvec));
    if (!memory) return 1;
    dvec* cost = reinterpret_cast<dvec*>((reinterpret_cast<uintptr_t>(memory) + sizeof(dvec) - 1) &
                                         ~uintptr_t(sizeof(dvec) - 1));
    double* costs = reinterpret_cast<double*>(cost);

    // a picked token ranks behind everything, one without a direction behind the usable ones
    const auto usable = [&](int64_t i) { return gram[i * stride + i] == gram[i * stride + i]; };
    const auto start = [&](int64_t i) { return usable(i) ? 0.0 : DBL_MAX; };

    for (int64_t j = n; j < vectors * HALF; ++j) costs[j] = INFINITY;
    for (int64_t i = 0; i < n; ++i) {
        dvec sum = dvec{};
        for_row(gram + i * stride, n, [&](int64_t, dvec values) { sum += values; });
        costs[i] = start(i);
        for (int lane = 0; lane < HALF; ++lane) costs[i] += sum[lane];
    }
    for (int64_t step = 0; step < k; ++step) {
        dvec smallest = cost[0];
        for (int64_t j = 1; j < vectors; ++j) smallest = cost[j] < smallest ? cost[j] : smallest;
        double least = smallest[0];
        for (int lane = 1; lane < HALF; ++lane) least = std::fmin(least, smallest[lane]);
        int64_t best = 0;
        while (costs[best] != least) ++best;  // the lowest index
        if (step == 0)  // from here on costs are sums over what is kept
            for (int64_t i = 0; i < n; ++i) costs[i] = start(i);
        costs[best] = INFINITY;
        for_row(gram + best * stride, n, [&](int64_t j, dvec values) { cost[j] += values; });
    }
    int64_t* next = kept;
    for (int64_t i = 0; i < n; ++i)
        if (costs[i] == INFINITY) *next++ = i;
    std::free(memory);
    return 0;
}
