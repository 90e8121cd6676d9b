// Threads that do one operation after the other inside one parallel region of OpenMP.
//
// A separate region for each operation would wake the threads each time, through the operating system if OpenMP does
// not let them spin. GNU's OpenMP does not, once a process has had more of its threads than processors, as when two
// Python threads use PyTorch. For a short text that is more than half of the time.
#pragma once

#include <omp.h>
#include <sched.h>

#include <atomic>

#include "vector.h"

struct Shared {
    alignas(64) std::atomic<int64_t> next{0};  // the first free task
    alignas(64) std::atomic<int> arrived{0};
    alignas(64) std::atomic<int> turn{0};  // how often all have arrived
};

class Team {
   public:
    const int size, id;  // of threads; this one's number

    Team() : size(1), id(0), shared(NULL) {}
    Team(int size, int id, Shared* shared) : size(size), id(id), shared(shared) {}

    // f(i) for all i < n, each by one thread; when it returns, all are done.
    template <typename F>
    __attribute__((always_inline)) void each(int64_t n, F f) const {
        if (size == 1) {
            for (int64_t i = 0; i < n; i++) f(i);
            return;
        }
        for (int64_t i; (i = shared->next.fetch_add(1, std::memory_order_relaxed)) < n;) f(i);
        wait();
    }

    // The same for tasks of equal length: each thread takes its share of consecutive tasks.
    template <typename F>
    __attribute__((always_inline)) void share(int64_t n, F f) const {
        const int64_t end = n * (id + 1) / size;
        for (int64_t i = n * id / size; i < end; i++) f(i);
        if (size > 1) wait();
    }

   private:
    static constexpr int SPINS = 4000;  // some tens of microseconds; then others may have the processor
    Shared* shared;

    void wait() const {
        const int turn = shared->turn.load(std::memory_order_relaxed);
        if (shared->arrived.fetch_add(1, std::memory_order_acq_rel) + 1 == size) {
            shared->next.store(0, std::memory_order_relaxed);
            shared->arrived.store(0, std::memory_order_relaxed);
            shared->turn.store(turn + 1, std::memory_order_release);
            return;
        }
        for (int i = 0; shared->turn.load(std::memory_order_acquire) == turn; i++)
            if (i < SPINS) _mm_pause();
            else sched_yield();
    }
};

// f(team) on all of OpenMP's threads.
template <typename F>
INLINE void in_parallel(F f) {
    Shared shared;
#pragma omp parallel
    f(Team(omp_get_num_threads(), omp_get_thread_num(), &shared));
}
