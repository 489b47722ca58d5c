// What the loader asks: which sources a library was built from, and what the processor can run.

extern "C" const char* ep_sources() { return EP_SOURCES; }

// Index into the variants of ep_core/kernels/build.py. Ask the baseline: it runs everywhere.
extern "C" int ep_variant() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (!(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))) return 0;
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                   __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")
               ? 2
               : 1;
#else
    return 0;
#endif
}
