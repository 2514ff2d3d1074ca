// How hosts deal work and memory to threads.
#pragma once
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>

namespace fastnlp {

// Uninitialised memory, aligned for vectors.
class Memory {
 public:
  explicit Memory(size_t bytes) : memory_(new char[bytes + 64]) {}
  void* get() const {
    return reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(memory_.get()) + 63) & ~uintptr_t{63});
  }

 private:
  std::unique_ptr<char[]> memory_;
};

// Numbers below a count, for whoever is free to take the next.
class Queue {
 public:
  explicit Queue(int64_t count) : count_(count) {}
  bool take(int64_t* index) { return (*index = next_++) < count_; }

 private:
  const int64_t count_;
  std::atomic<int64_t> next_{0};
};

// f(queue) on as many threads as there are, or on this one.
template <class F>
void in_parallel(int64_t count, bool alone, const F& f) {
  Queue queue(count);
  if (alone) return f(queue);
  const int64_t threads = std::min<int64_t>(count, torch::stable::get_num_threads());
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) { f(queue); });
}

}  // namespace fastnlp
