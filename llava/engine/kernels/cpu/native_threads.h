// Threads that do the items of one loop after another, for native.cpp.
//
// Between loops they spin for a while, since waking takes longer than a loop, and then they sleep. PyTorch's threads
// (OpenMP's) sleep at once where several threads of a program have run loops, as here where one has loaded the model
// and another computes; and where only one has, they hardly ever do, which starves others on a busy machine.

#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <system_error>
#include <thread>

class Threads {
   public:
    // Does work(0) to work(count - 1), by the calling thread and others, and returns when all is done.
    template <class Work>
    void run(long count, long num_threads, const Work& work) {
        if (count <= 1 || num_threads <= 1) {
            for (long item = 0; item < count; item++) work(item);
            return;
        }
        std::lock_guard<std::mutex> alone(running_);
        start(std::min(count, num_threads) - 1);
        const uint64_t loop = (next_ >> 32) + 1;
        next_ = (loop - 1) << 32 | NONE;  // from here on nobody takes an item of the last loop
        call_ = [](const void* context, long item) { (*static_cast<const Work*>(context))(item); };
        context_ = &work;
        count_ = count;
        num_done_ = 0;
        next_ = loop << 32;
        if (num_asleep_ > 0) {
            std::lock_guard<std::mutex> lock(sleeping_);
            wake_.notify_all();
        }
        take_items(loop);
        for (long spins = 0; num_done_ < count; spins++) relax(spins);
    }

   private:
    static constexpr auto PATIENCE = std::chrono::microseconds(200);  // loops of a step follow one another faster
    static constexpr uint64_t NONE = 0xffffffff;

    void start(long num_helpers) {
        num_helpers_ = num_helpers;
        try {
            for (; num_started_ < num_helpers; num_started_++) std::thread(&Threads::help, this, num_started_).detach();
        } catch (const std::system_error&) {  // no more threads are to be had: whoever is there does all the work
        }
    }

    // An item is taken by raising `next_`, which holds the number of the loop as well, so that nobody takes an item of
    // a loop that he does not know. The loop's description stays as it is until all its items are done.
    void take_items(uint64_t loop) {
        uint64_t ticket = next_;
        while (ticket >> 32 == loop && long(ticket & NONE) < count_) {
            if (!next_.compare_exchange_weak(ticket, ticket + 1)) continue;
            call_.load()(context_, long(ticket & NONE));
            num_done_++;
            ticket = next_;
        }
    }

    void help(long number) {
        for (uint64_t seen = 0;;) {
            const auto begin = std::chrono::steady_clock::now();
            for (long spins = 0; next_ >> 32 == seen; spins++) {
                relax(spins);
                if (spins % 64 == 63 && std::chrono::steady_clock::now() - begin > PATIENCE) {
                    std::unique_lock<std::mutex> lock(sleeping_);
                    num_asleep_++;
                    wake_.wait(lock, [&] { return next_ >> 32 != seen; });
                    num_asleep_--;
                }
            }
            seen = next_ >> 32;
            if (number < num_helpers_) take_items(seen);
        }
    }

    static void relax(long spins) {
        if (spins % 256 == 255) std::this_thread::yield();
#if defined(__x86_64__)
        __builtin_ia32_pause();
#endif
    }

    std::mutex running_, sleeping_;
    std::condition_variable wake_;
    std::atomic<uint64_t> next_{0};
    std::atomic<long> count_{0}, num_done_{0}, num_asleep_{0}, num_helpers_{0};
    std::atomic<const void*> context_{nullptr};
    std::atomic<void (*)(const void*, long)> call_{nullptr};
    long num_started_ = 0;
};

// Never destroyed: the threads live as long as the program.
inline Threads& threads() {
    static Threads* const all = new Threads;
    return *all;
}
