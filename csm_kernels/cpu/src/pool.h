// Threads that run one function together, spin between its phases and sleep between calls.
#pragma once
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>
#if !defined(_WIN32)
#include <unistd.h>
#endif
#if defined(__linux__)
#include <sched.h>
#endif
#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#endif

namespace csm {

inline void relax() {
#if defined(__x86_64__) || defined(__i386__)
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// Spins for some 50 us and then gives the core away: whoever is waited for may be the one that has none.
class Barrier {
  public:
    explicit Barrier(int threads) : threads_(threads) {}

    void wait() {
        if (threads_ == 1) return;
        const unsigned round = round_.load(std::memory_order_acquire);
        if (left_.fetch_add(1, std::memory_order_acq_rel) + 1 == threads_) {
            left_.store(0, std::memory_order_relaxed);
            round_.store(round + 1, std::memory_order_release);
            return;
        }
        for (int spins = 0; round_.load(std::memory_order_acquire) == round; ++spins) {
            if (spins < 2000)
                relax();
            else
                std::this_thread::yield();
        }
    }

  private:
    const int threads_;
    alignas(64) std::atomic<int> left_{0};
    alignas(64) std::atomic<unsigned> round_{0};
};

// The caller may have told its thread to flush denormals, the others have not been: bits would depend on who computes.
class Denormals {
  public:
#if defined(__x86_64__)
    Denormals() : before_(_mm_getcsr()) { _mm_setcsr(before_ & ~0x8040u); }
    ~Denormals() { _mm_setcsr(before_); }
    Denormals(const Denormals&) = delete;

  private:
    const unsigned before_;
#endif
};

// Which processor each thread of a pool is on. After a sleep Linux may wake a thread on the processor of whoever wakes it
// and leave it there for a second, beside an idle one: half the speed. Whoever finds itself so goes elsewhere.
class Places {
  public:
    explicit Places(int threads) : on_(threads) {}

    // The caller's; the others' are kept from their last call.
    void here(int thread) { on_[thread].store(processor(), std::memory_order_relaxed); }

    void apart(int thread) {
        here(thread);
        const int mine = on_[thread].load(std::memory_order_relaxed);
        for (int t = 0; t < thread; ++t)
            if (mine >= 0 && on_[t].load(std::memory_order_relaxed) == mine) return move(thread);
    }

  private:
#if defined(__linux__)
    static int processor() { return sched_getcpu(); }

    void move(int thread) {
        cpu_set_t allowed, left;
        if (sched_getaffinity(0, sizeof(allowed), &allowed) != 0) return;  // more processors than the set holds
        left = allowed;
        for (int t = 0; t < int(on_.size()); ++t) {
            const int taken = on_[t].load(std::memory_order_relaxed);
            if (taken >= 0 && taken < CPU_SETSIZE) CPU_CLR(taken, &left);
        }
        if (CPU_COUNT(&left) == 0 || sched_setaffinity(0, sizeof(left), &left) != 0) return;
        sched_setaffinity(0, sizeof(allowed), &allowed);  // it stays where it is, and is free to be moved again
        here(thread);
    }
#else
    static int processor() { return -1; }
    void move(int) {}
#endif

    std::vector<std::atomic<int>> on_;
};

class Pool {
  public:
    explicit Pool(int threads) : barrier(threads), process_(process()), threads_(threads), places_(threads) {
        for (int t = 1; t < threads; ++t) workers_.emplace_back([this, t] { work(t); });
    }

    int threads() const { return threads_; }
    bool forked() const { return process_ != process(); }  // a child of the process that started the threads has none

    // fn(thread) on every thread, the caller being thread 0; returns when all are done. One call at a time.
    void run(const std::function<void(int)>& fn) {
        std::lock_guard<std::mutex> one(calls_);
        [[maybe_unused]] const Denormals kept;
        if (threads_ > 1) {
            places_.here(0);
            {
                std::lock_guard<std::mutex> lock(mutex_);
                fn_ = &fn;
                call_.fetch_add(1, std::memory_order_release);
            }
            wake_.notify_all();
        }
        fn(0);
        barrier.wait();  // all have left fn
    }

    Barrier barrier;

  private:
    static int64_t process() {
#if defined(_WIN32)
        return 0;
#else
        return int64_t(getpid());
#endif
    }

    void work(int t) {
        unsigned seen = 0;
        for (;;) {
            // One call is often followed by another: some 50 us awake, then asleep.
            for (int spins = 0; spins < 2000 && call_.load(std::memory_order_acquire) == seen; ++spins) relax();
            const std::function<void(int)>* fn;
            {
                std::unique_lock<std::mutex> lock(mutex_);
                wake_.wait(lock, [&] { return call_.load(std::memory_order_relaxed) != seen; });
                seen = call_.load(std::memory_order_relaxed);
                fn = fn_;
            }
            places_.apart(t);
            (*fn)(t);
            barrier.wait();
        }
    }

    const int64_t process_;
    const int threads_;
    Places places_;
    std::mutex mutex_, calls_;
    std::condition_variable wake_;
    std::atomic<unsigned> call_{0};
    const std::function<void(int)>* fn_ = nullptr;
    std::vector<std::thread> workers_;
};

// One pool per number of threads, shared by all sessions and never destroyed: a program may end, or fork, at any time, and
// who sleeps costs nothing. A child of a fork gets pools of its own.
Pool& pool_of(int threads);

}  // namespace csm
