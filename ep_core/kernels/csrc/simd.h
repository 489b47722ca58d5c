// Vectors of float, one lane a token, as wide as the instruction set this file is compiled for.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <utility>

namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16;
constexpr int ROWS = 4;  // rows that fit in the registers together
#elif defined(__AVX__)
constexpr int LANES = 8;
constexpr int ROWS = 2;
#elif defined(__aarch64__)
constexpr int LANES = 4;
constexpr int ROWS = 4;
#else
constexpr int LANES = 4;
constexpr int ROWS = 2;
#endif

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int32_t ivec __attribute__((vector_size(4 * LANES)));
typedef uint16_t hvec __attribute__((vector_size(2 * LANES)));
typedef double dvec __attribute__((vector_size(4 * LANES)));
constexpr int HALF = LANES / 2;

inline vec splat(float x) { return vec{} + x; }

inline dvec splat_double(double x) { return dvec{} + x; }

inline vec square_root(vec x) {
    vec root;
    for (int lane = 0; lane < LANES; ++lane) root[lane] = __builtin_sqrtf(x[lane]);
    return root;
}

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define EP_SHUFFLE 1  // gcc 12, clang
#endif
#endif

template <int STEP, int... L>
inline void exchange(vec& upper, vec& lower, std::integer_sequence<int, L...>) {
#if EP_SHUFFLE
    const vec first = __builtin_shufflevector(upper, lower, (L & STEP ? LANES + L - STEP : L)...);
    const vec second = __builtin_shufflevector(upper, lower, (L & STEP ? LANES + L : L + STEP)...);
#else
    vec first = upper, second = lower;
    ((L & STEP ? void(first[L] = lower[L - STEP]) : void(second[L] = upper[L + STEP])), ...);
#endif
    upper = first;
    lower = second;
}

// Transpose each SIZE x SIZE block of SIZE rows in place: exchange ever smaller off-diagonal blocks.
template <int SIZE, int STEP = SIZE / 2>
inline void transpose(vec* rows) {
    for (int i = 0; i < SIZE; ++i)
        if (!(i & STEP))
            exchange<STEP>(rows[i], rows[i + STEP], std::make_integer_sequence<int, LANES>{});
    if constexpr (STEP > 1) transpose<SIZE, STEP / 2>(rows);
}

// The storage formats of torch that are read; the numbers are the library's interface.
enum Format : int { BFLOAT16 = 0, FLOAT16 = 1, FLOAT32 = 2 };

template <Format F>
struct Stored {
    typedef uint16_t type;
};
template <>
struct Stored<FLOAT32> {
    typedef float type;
};

// Two 16-bit numbers in each lane as floats; exact for every number, infinity and NaN.
template <Format F>
inline void widen_pairs(ivec pairs, vec& low, vec& high) {
    if constexpr (F == BFLOAT16) {
        low = (vec)(pairs << 16);
        high = (vec)(pairs & -65536);
    } else {
        const auto widen = [](ivec bits) {  // in the upper half of each lane
            const ivec magnitude = (bits >> 3) & 0x0fffe000;
            const vec value = (vec)magnitude * 0x1p112f;  // shifts the exponent, denormals too
            const ivec special = magnitude >= 0x0f800000;
            return (vec)((ivec)value | (special & (magnitude | 0x7f800000)) | (bits & INT32_MIN));
        };
        low = widen(pairs << 16);
        high = widen(pairs & -65536);
    }
}

template <int... L>
inline vec join(hvec first, hvec second, std::integer_sequence<int, L...>) {
#if EP_SHUFFLE
    return (vec)__builtin_shufflevector(first, second, L...);
#else
    vec joined;
    std::memcpy(&joined, &first, sizeof first);
    std::memcpy(reinterpret_cast<char*>(&joined) + sizeof first, &second, sizeof second);
    return joined;
#endif
}

// LANES numbers of each of LANES rows, as floats: to[i][lane] = rows[lane][i].
template <Format F>
inline void gather(const typename Stored<F>::type* const (&rows)[LANES], vec* to) {
    if constexpr (F == FLOAT32) {
        for (int lane = 0; lane < LANES; ++lane) std::memcpy(&to[lane], rows[lane], sizeof(vec));
        transpose<LANES>(to);
    } else {  // pairs move together: half the work of moving floats
        vec pairs[HALF];
        for (int i = 0; i < HALF; ++i) {
            hvec first, second;
            std::memcpy(&first, rows[i], sizeof first);
            std::memcpy(&second, rows[i + HALF], sizeof second);
            pairs[i] = join(first, second, std::make_integer_sequence<int, 2 * LANES>{});
        }
        transpose<HALF>(pairs);
        for (int i = 0; i < HALF; ++i) widen_pairs<F>((ivec)pairs[i], to[2 * i], to[2 * i + 1]);
    }
}

// One number.
template <Format F>
inline float widen(typename Stored<F>::type from) {
    if constexpr (F == FLOAT32) {
        return from;
    } else {
        vec low, high;
        widen_pairs<F>(ivec{} + from, low, high);
        return low[0];
    }
}

}  // namespace
