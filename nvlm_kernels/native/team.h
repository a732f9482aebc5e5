// Threads that work side by side, and what they ask the memory for ahead of time.

#pragma once

#include <omp.h>

#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

namespace {

constexpr int MOST_STREAMS = 4;  // that a thread reads side by side

// Bytes between the weights in use and those asked for, into the second and into the first cache. Others from 4096, 512
// to 32768, 4096 were no faster, with one stream.
constexpr int64_t FAR = 16384, NEAR = 2048;

inline void ask(const char* at) {
    __builtin_prefetch(at + FAR, 0, 2);
    __builtin_prefetch(at + NEAR, 0, 3);
}

// Where threads wait for each other, some hundred times a step. OpenMP's own barrier puts a waiting thread to sleep as
// soon as the process has more threads than cores, and waking it takes longer than the work: 2.8 ms against 0.7 a step
// of 9 MB of weights. This one spins, and lets others run after a while.
struct Team {
    // Of a product, a thread's share: pieces taken (and tries when there was none left), those that other threads took.
    struct alignas(128) Range {
        std::atomic<int64_t> taken{0}, stolen{0};
    };

    const int num;
    std::vector<Range> ranges[2];  // of this product's threads, and of the next one's
    std::atomic<int> come{0}, round{0};

    explicit Team(int num) : num(num), ranges{std::vector<Range>(num), std::vector<Range>(num)} {}
};

thread_local Team* team = nullptr;
thread_local int turn = 0;  // which of the ranges are this product's

// What a thread reads next, stream by stream. It asks for that while it waits and while it attends, when the memory has
// less to do.
struct Next {
    const char* at[MOST_STREAMS] = {};
    int num = 0;
    int64_t left = 0;  // bytes of each
};

thread_local Next next;

// Asks for as many lines of each stream, into the second cache.
inline void ask_ahead(Next& ahead, int64_t lines) {
    for (; lines > 0 && ahead.left > 0; lines--, ahead.left -= 64)
        for (int i = 0; i < ahead.num; i++) {
            __builtin_prefetch(ahead.at[i], 0, 2);
            ahead.at[i] += 64;
        }
}

inline void meet() {
    const int round = team->round.load(std::memory_order_relaxed);
    if (team->come.fetch_add(1, std::memory_order_acq_rel) == team->num - 1) {
        team->come.store(0, std::memory_order_relaxed);
        team->round.store(round + 1, std::memory_order_release);
        return;
    }
    Next& ahead = next;
    for (int spins = 0; team->round.load(std::memory_order_acquire) == round; spins++) {
        if (ahead.left > 0)
            ask_ahead(ahead, 1);
        else if (spins > 20000)
            std::this_thread::yield();
#ifdef __x86_64__
        else
            __builtin_ia32_pause();
#endif
    }
}

// Runs fn on every thread of a team.
template <typename Fn>
void together(int64_t threads, const Fn& fn) {
    Team* shared = nullptr;
#pragma omp parallel num_threads(int(threads))
    {
#pragma omp single
        shared = new Team(omp_get_num_threads());
        team = shared;
        turn = 0;
        next = Next{};
        fn();
    }
    delete shared;
}

}  // namespace
