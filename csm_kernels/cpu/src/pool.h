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

class Pool {
  public:
    explicit Pool(int threads) : barrier(threads), process_(process()), threads_(threads) {
        for (int t = 1; t < threads; ++t) workers_.emplace_back([this, t] { work(t); });
    }

    int threads() const { return threads_; }
    bool forked() const { return process_ != process(); }  // a child of the process that started the threads has none

    // fn(thread) on every thread, the caller being thread 0; returns when all are done. One call at a time.
    void run(const std::function<void(int)>& fn) {
        std::lock_guard<std::mutex> one(calls_);
        [[maybe_unused]] const Denormals kept;
        if (threads_ > 1) {
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
            (*fn)(t);
            barrier.wait();
        }
    }

    const int64_t process_;
    const int threads_;
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
