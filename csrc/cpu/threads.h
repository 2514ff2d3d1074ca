// How hosts deal work and memory to threads.
#pragma once
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <memory>
#include <mutex>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

namespace fastnlp {

// Uninitialised memory, aligned for vectors.
class Memory {
 public:
  // Out of memory in torch's words, which callers look for.
  explicit Memory(size_t bytes) : memory_(new (std::nothrow) char[bytes + 64]) {
    if (!memory_)
      throw std::runtime_error("DefaultCPUAllocator: can't allocate memory: " + std::to_string(bytes) +
                               " bytes of workspace");
  }
  void* get() const {
    return reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(memory_.get()) + 63) & ~uintptr_t{63});
  }

 private:
  std::unique_ptr<char[]> memory_;
};

// torch's, which would say of what a thread throws no more than that a call has failed.
template <class F>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const F& f) {
  std::mutex mutex;
  std::exception_ptr thrown;
  torch::stable::parallel_for(begin, end, grain, [&](int64_t first, int64_t last) {
    try {
      f(first, last);
    } catch (...) {
      const std::lock_guard<std::mutex> lock(mutex);
      if (!thrown) thrown = std::current_exception();
    }
  });
  if (thrown) std::rethrow_exception(thrown);
}

// Numbers that a thread has been dealt.
struct alignas(64) Share {
  std::atomic<int64_t> next;
  int64_t end;
};

// What a thread takes its numbers from: its own share first, which is the same part of a tensor in every pass and in
// torch's own ops, so that it lies in this core's cache; then whatever others have left.
class Queue {
 public:
  Queue(std::vector<Share>& shares, int64_t own) : shares_(shares), own_(own) {}
  bool take(int64_t* index) {
    for (size_t turn = 0; turn < shares_.size(); ++turn) {
      Share& share = shares_[(own_ + turn) % shares_.size()];
      if (share.next.load(std::memory_order_relaxed) < share.end && (*index = share.next++) < share.end) return true;
    }
    return false;
  }

 private:
  std::vector<Share>& shares_;
  const size_t own_;
};

// f(queue) on as many threads as there are, or on this one.
template <class F>
void in_parallel(int64_t count, bool alone, const F& f) {
  const int64_t threads = alone ? 1 : std::min<int64_t>(count, torch::stable::get_num_threads());
  std::vector<Share> shares(threads);
  for (int64_t i = 0; i < threads; ++i) {
    shares[i].next.store(count * i / threads, std::memory_order_relaxed);
    shares[i].end = count * (i + 1) / threads;
  }
  const auto run = [&](int64_t own, int64_t) {
    Queue queue(shares, own);
    f(queue);
  };
  if (alone) return run(0, 1);
  parallel_for(0, threads, 1, run);
}

}  // namespace fastnlp
