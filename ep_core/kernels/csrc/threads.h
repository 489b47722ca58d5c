// Work shared out over threads that live for one call: no pool that a fork would lose or that
// would compete with torch's.
#pragma once

#include <atomic>
#include <cstdint>
#include <system_error>
#include <thread>
#include <vector>

namespace {

// `work(begin, end)` over [0, items), one range a thread. 0, or 1 where a range was not done.
template <class Work>
int share_work(int64_t items, int64_t threads, const Work& work) {
    constexpr int64_t LEAST = 4;  // items worth a thread
    const int64_t useful = items / LEAST;
    const int64_t shares = useful < 1 ? 1 : useful < threads ? useful : threads;
    if (shares == 1) return work(0, items) ? 0 : 1;
    std::atomic<bool> failed{false};
    const auto part = [&](int64_t share) {
        if (!work(items * share / shares, items * (share + 1) / shares)) failed = true;
    };
    std::vector<std::thread> others;
    int64_t started = 1;
    try {
        others.reserve(shares - 1);
        for (; started < shares; ++started) others.emplace_back(part, started);
    } catch (const std::exception&) {  // no more threads to be had: their shares are done here
    }
    part(0);
    for (int64_t share = started; share < shares; ++share) part(share);
    for (std::thread& other : others) other.join();
    return failed ? 1 : 0;
}

}  // namespace
