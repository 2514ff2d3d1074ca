// Host side of the Adafactor op on CPU: the step as a list of units of work, taken in turn by all threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <thread>

#include "../adafactor_call.h"
#include "adafactor.h"
#include "isa.h"

namespace fastnlp {
namespace {

constexpr int64_t kStrip = 1 << 16;         // elements of a unit, at least: some 20 microseconds
constexpr int64_t kStrips = 96 << 10;       // numbers of the strips of a matrix, so that their sums stay in the cache
constexpr int64_t kManyStrips = 16;         // that a large matrix has even where those are more
constexpr int64_t kSmall = 1 << 14;         // elements of a tensor that is not worth a unit of its own
constexpr int64_t kVectorStrip = 1 << 15;   // elements of a vector's unit
constexpr int64_t kWorthThreads = 1 << 15;  // elements of a call that wakes other threads

AdafactorKernels kernels_for(const AdafactorTensor& tensor) {
  return use_v3() ? v3::adafactor_kernels(tensor.param_dtype, tensor.grad_dtype)
                  : baseline::adafactor_kernels(tensor.param_dtype, tensor.grad_dtype);
}

// The kinds of units, in the order in which a tensor goes through them.
enum Kind { kAccumulate, kNorms, kExact, kApply, kKinds };

struct Item : AdafactorItem {
  AdafactorKernels kernels;
  int64_t index;
  // A matrix in strips of rows, or so many whole matrices to a unit.
  int64_t strips = 1;
  int64_t matrices = 1;
  int64_t units[kKinds] = {};
  std::vector<AdafactorTotals> totals[kKinds];  // of each unit
  double grad_squares = 0;
  char* columns = nullptr;                // of all strips
  const Item* earlier = nullptr;          // whose strips' sums lie in the same place
  std::vector<std::atomic<int>> readers;  // of each strip: the thread that has it in its cache, or kUpdated
  std::atomic<int64_t> left[kKinds] = {};
  std::atomic<bool> done[kKinds] = {};

  int64_t numel() const { return tensor->batch * tensor->rows * tensor->cols; }
};

constexpr int kUpdated = -1;

// One unit of a large tensor, or all units of the small tensors [begin, end). Which strip is updated is for the thread
// that takes the unit to choose.
struct Unit {
  Item* item;
  Kind kind;
  int64_t begin;
  int64_t end;
};

struct Step {
  const AdafactorCall call;
  const AdafactorArguments& a;
  const size_t size;  // of C
  const bool gated;   // nothing may be written before everything has been summed
  void* sums;
  std::vector<Item> items;
  std::vector<Item*> large, small;
  std::vector<Tensor> own;  // memory of torch's allocator, which a profiler sees
  size_t scratch = 0;
  int64_t phases;  // of the pass that runs

  explicit Step(const AdafactorArguments& arguments)
      : call(arguments),
        a(arguments),
        size(call.compute == ScalarType::Double ? 8 : 4),
        gated(arguments.max_grad_norm > 0 || arguments.skip_nonfinite),
        items(call.tensors.size()) {
    if (items.empty() || a.phases == 0 || (a.found_inf && a.found_inf->const_data_ptr<float>()[0] != 0)) return;
    sums = a.sums ? a.sums->mutable_data_ptr() : memory(call.sums_size * static_cast<int64_t>(size));
    const double clip = a.phases & kAdafactorRows ? 1 : clip_factor();
    for (size_t i = 0; i < items.size(); ++i) prepare(static_cast<int64_t>(i), clip);
    place_strips();
    run();
  }

 private:
  void* memory(int64_t bytes) {
    own.push_back(new_tensor(a.params[0], {bytes}, ScalarType::Byte));
    return own.back().mutable_data_ptr();
  }

  double sum(int64_t at) const {
    return size == 8 ? static_cast<const double*>(sums)[at] : static_cast<double>(static_cast<const float*>(sums)[at]);
  }
  void set_sum(int64_t at, double value) {
    if (size == 8)
      static_cast<double*>(sums)[at] = value;
    else
      static_cast<float*>(sums)[at] = static_cast<float>(value);
  }

  double grad_factor() const { return a.grad_scale ? 1 / double(a.grad_scale->const_data_ptr<float>()[0]) : 1; }
  double clip_factor() const { return adafactor_clip(a.max_grad_norm, std::sqrt(sum(0)) * std::abs(grad_factor())); }

  void prepare(int64_t i, double clip) {
    Item& item = items[i];
    const AdafactorTensor& t = call.tensors[i];
    item.tensor = &t;
    item.group = &call.group_of(t);
    item.sums = sums;
    item.index = i;
    item.kernels = kernels_for(t);
    const double step = static_cast<double>(a.steps.const_data_ptr<float>()[i]) + 1;
    item.step = adafactor_scalars(*item.group, step, a.lr.const_data_ptr<double>()[t.group], grad_factor() * clip);
    const double counted = step >= 0 && step < 0x1p63 ? step : 0;  // another loader may have written anything
    item.key = adafactor_key(static_cast<uint64_t>(a.seed), static_cast<uint64_t>(counted), t.id);
    item.sharded = !a.shards.empty();
    if (t.whole_numel == 0) return;
    scratch = std::max(scratch, item.kernels.scratch(item));
    if (!t.factored) {
      item.units[kAccumulate] = item.units[kApply] = (t.cols + kVectorStrip - 1) / kVectorStrip;
    } else {
      const int64_t area = t.rows * t.cols, parts = item.group->layer_adaptation != 0 ? 3 : 2;
      const int64_t most = std::max(kManyStrips, kStrips / std::max<int64_t>(1, parts * item.kernels.padded(t.cols)));
      item.strips = std::max<int64_t>(1, std::min({area / kStrip, most, t.rows}));
      item.matrices = std::max<int64_t>(1, item.strips > 1 ? 1 : kStrip / std::max<int64_t>(1, area));
      item.units[kNorms] = (t.batch + item.matrices - 1) / item.matrices;
      item.units[kAccumulate] = item.units[kApply] = item.units[kNorms] * item.strips;
      if (item.group->torch_mode != 0) item.units[kExact] = item.units[kApply];
    }
    (item.numel() <= kSmall ? small : large).push_back(&item);
    for (int k = 0; k < kKinds; ++k) item.totals[k].resize(static_cast<size_t>(item.units[k]));
    item.readers = std::vector<std::atomic<int>>(static_cast<size_t>(item.units[kApply]));
  }

  // The sums of the strips are read soon after they are written: two places serve all matrices in turn.
  void place_strips() {
    std::vector<Item*> striped;
    size_t widest[2] = {0, 0};
    for (Item* item : large) {
      if (item->strips == 1) continue;
      size_t& width = widest[striped.size() % 2];
      width = std::max(width, static_cast<size_t>(item->units[kAccumulate] * columns_bytes(*item) + 63) / 64 * 64);
      striped.push_back(item);
    }
    char* const place = static_cast<char*>(memory(static_cast<int64_t>(widest[0] + widest[1])));
    for (size_t k = 0; k < striped.size(); ++k) {
      striped[k]->columns = place + (k % 2) * widest[0];
      striped[k]->earlier = k >= 2 ? striped[k - 2] : nullptr;
    }
  }

  int64_t columns_bytes(const Item& item) const {
    const int64_t parts = item.group->layer_adaptation != 0 ? 3 : 2;
    return parts * item.kernels.padded(item.tensor->cols) * static_cast<int64_t>(size);
  }

  bool wants(const Item& item, Kind kind) const {
    if (item.units[kind] == 0) return false;
    switch (kind) {
      case kAccumulate: return phases & (kAdafactorRows | kAdafactorColumns);
      case kNorms: return phases & (kAdafactorColumns | kAdafactorNorms);
      case kExact: return phases & kAdafactorNorms;
      default: return phases & kAdafactorApply;
    }
  }

  void run() {
    phases = gated ? a.phases & ~kAdafactorApply : a.phases;
    if (a.phases & kAdafactorRows) {
      pass();
      double squares = 0;
      for (const Item& item : items) squares += item.grad_squares;
      set_sum(0, squares);
      const double clip = gated && a.phases & kAdafactorColumns ? clip_factor() : 1;
      if (clip != 1) {  // the column sums were those of larger gradients
        for (Item& item : items) item.step.grad *= clip;
        phases &= ~kAdafactorRows;
        pass();
      }
    } else if (phases) {
      pass();
    }
    if (!(a.phases & kAdafactorApply)) return;
    if (gated) {
      if (a.skip_nonfinite && !std::isfinite(sum(0))) return;
      phases = kAdafactorApply;
      pass();
    }
    float* const steps = a.steps.mutable_data_ptr<float>();
    float* const rms = a.rms ? a.rms->mutable_data_ptr<float>() : nullptr;
    for (size_t i = 0; i < items.size(); ++i) {
      const AdafactorGroup& group = *items[i].group;
      steps[i] += 1;
      if (rms && items[i].tensor->whole_numel != 0 && (group.torch_mode != 0 || group.scale_parameter != 0))
        rms[i] = static_cast<float>(items[i].gain.rms);
    }
  }

  // One pass over all tensors. A large tensor is updated while its gradient is in the cache; some units of the next one
  // come before, so that no thread waits while another computes the factors.
  void pass() {
    std::vector<Unit> units;
    int64_t work = 0;
    for (Item& item : items) {
      for (int k = 0; k < kKinds; ++k) {
        item.left[k].store(item.units[k], std::memory_order_relaxed);
        item.done[k].store(!wants(item, Kind(k)), std::memory_order_relaxed);
      }
      item.gain = gain(item);  // where nothing is left to sum
      work += item.numel();
    }
    const auto append = [&](Item* item, Kind kind, int64_t begin = 0, int64_t end = INT64_MAX) {
      if (wants(*item, kind))
        for (int64_t u = begin; u < std::min(end, item->units[kind]); ++u) units.push_back({item, kind, u, u + 1});
    };
    int64_t bundled = 0;
    for (size_t k = 0; k < small.size(); ++k) {
      const auto at = static_cast<int64_t>(k);
      if (bundled == 0) units.push_back({nullptr, kKinds, at, at});
      units.back().end = at + 1;
      bundled += small[k]->numel();
      if (bundled >= kStrip) bundled = 0;
    }
    const auto threads = static_cast<int64_t>(torch::stable::get_num_threads());
    for (size_t k = 0; k < large.size(); ++k) {
      append(large[k], kAccumulate, k == 0 ? 0 : threads);
      if (k + 1 < large.size()) append(large[k + 1], kAccumulate, 0, threads);
      append(large[k], kNorms);
      append(large[k], kExact);
      append(large[k], kApply);
    }

    std::atomic<size_t> next{0};
    const auto worker = [&](int64_t thread, int64_t) {
      std::vector<double> room((scratch + 7) / 8);
      for (size_t u; (u = next.fetch_add(1, std::memory_order_relaxed)) < units.size();)
        take(units[u], static_cast<int>(thread), room.data());
    };
    if (work < kWorthThreads)
      worker(0, 1);
    else
      torch::stable::parallel_for(0, threads, 1, worker);
  }

  static void await(const Item& item, Kind kind) {
    for (int turn = 0; !item.done[kind].load(std::memory_order_acquire); ++turn)
      if (turn > 100) std::this_thread::yield();
  }

  // Whatever a unit waits for stands before it in the list, so another thread is at it and waits for nothing later.
  void take(const Unit& unit, int thread, void* room) {
    if (!unit.item) {
      for (int64_t s = unit.begin; s < unit.end; ++s)
        for (int k = 0; k < kKinds; ++k)
          for (int64_t u = 0; wants(*small[s], Kind(k)) && u < small[s]->units[k]; ++u)
            work(*small[s], Kind(k), u, room);
      return;
    }
    Item& item = *unit.item;
    if (unit.kind == kAccumulate && item.earlier) await(*item.earlier, kNorms);
    for (int k = 0; k < unit.kind; ++k) await(item, Kind(k));
    if (unit.kind == kAccumulate) item.readers[unit.begin].store(thread, std::memory_order_relaxed);
    work(item, unit.kind, unit.kind == kApply ? nearest(item, thread) : unit.begin, room);
  }

  // A strip to update: of those that this thread has read, or else of all, the last one read. There are as many calls
  // as strips.
  static int64_t nearest(Item& item, int thread) {
    for (bool own : {true, false})
      for (auto strip = static_cast<int64_t>(item.readers.size()); strip-- > 0;) {
        int reader = item.readers[strip].load(std::memory_order_relaxed);
        if (own ? reader != thread : reader == kUpdated) continue;
        if (item.readers[strip].compare_exchange_strong(reader, kUpdated, std::memory_order_relaxed)) return strip;
      }
    return 0;  // not reached
  }

  void work(Item& item, Kind kind, int64_t unit, void* room) {
    AdafactorTotals& totals = item.totals[kind][unit];
    totals = {};
    if (!item.tensor->factored) {
      const int64_t begin = unit * kVectorStrip, end = std::min(item.tensor->cols, begin + kVectorStrip);
      if (kind == kAccumulate)
        item.kernels.accumulate_vector(item, phases, begin, end, room, totals);
      else
        item.kernels.apply_vector(item, begin, end, room);
    } else if (item.strips > 1) {
      strip(item, kind, unit, room, totals);
    } else {
      const int64_t last = std::min(item.tensor->batch, (unit + 1) * item.matrices);
      for (int64_t b = unit * item.matrices; b < last; ++b) matrix(item, kind, b, room, totals);
    }
    if (item.left[kind].fetch_sub(1, std::memory_order_acq_rel) != 1) return;
    settle(item, kind);
    item.done[kind].store(true, std::memory_order_release);
  }

  void matrix(Item& item, Kind kind, int64_t b, void* room, AdafactorTotals& totals) {
    const int64_t rows = item.tensor->rows;
    switch (kind) {
      case kAccumulate: {
        AdafactorTotals own;
        item.kernels.accumulate(item, phases, b, 0, rows, nullptr, room, own);
        totals.grad_squares += own.grad_squares;
        totals.param_squares += own.param_squares;
        return;
      }
      case kNorms:
        if (phases & kAdafactorNorms) item.kernels.norms(item, b, totals);
        return;
      case kExact: return item.kernels.exact(item, b, 0, rows, room, totals);
      default: return item.kernels.apply(item, b, 0, rows, room);
    }
  }

  void strip(Item& item, Kind kind, int64_t unit, void* room, AdafactorTotals& totals) {
    const int64_t bytes = columns_bytes(item);
    if (kind == kNorms) {
      const int64_t first = unit * item.strips;
      double factors = 0;
      for (int64_t s = 0; s < item.strips; ++s) factors += item.totals[kAccumulate][first + s].row_factors;
      if (phases & kAdafactorColumns)
        item.kernels.reduce(item, unit, item.columns + first * bytes, item.strips, factors);
      if (phases & kAdafactorNorms) item.kernels.norms(item, unit, totals);
      return;
    }
    const int64_t rows = item.tensor->rows, b = unit / item.strips, s = unit % item.strips;
    const int64_t begin = rows * s / item.strips, end = rows * (s + 1) / item.strips;
    if (kind == kAccumulate)
      item.kernels.accumulate(item, phases, b, begin, end, item.columns + unit * bytes, room, totals);
    else if (kind == kExact)
      item.kernels.exact(item, b, begin, end, room, totals);
    else
      item.kernels.apply(item, b, begin, end, room);
  }

  // After the last unit of a kind: the sums of the tensor, in the order of its units.
  void settle(Item& item, Kind kind) {
    AdafactorTotals sum;
    for (const AdafactorTotals& part : item.totals[kind]) {
      sum.grad_squares += part.grad_squares;
      sum.param_squares += part.param_squares;
      sum.update_squares += part.update_squares;
      sum.product += part.product;
    }
    if (kind == kAccumulate && phases & kAdafactorRows) {
      item.grad_squares = sum.grad_squares;
      set_sum(adafactor_sum(item.index, kSumParam), sum.param_squares);
    }
    const bool vector = !item.tensor->factored;
    if (kind == kNorms ? phases & kAdafactorNorms : kind == kAccumulate && vector && phases & kAdafactorColumns) {
      set_sum(adafactor_sum(item.index, kSumUpdate), sum.update_squares);
      set_sum(adafactor_sum(item.index, kSumProduct), sum.product);
    } else if (kind == kExact) {
      const int64_t update = adafactor_sum(item.index, kSumUpdate), product = adafactor_sum(item.index, kSumProduct);
      set_sum(update, this->sum(update) + sum.update_squares);
      set_sum(product, this->sum(product) + sum.product);
    }
    if (phases & kAdafactorApply && kind != kApply) item.gain = gain(item);
  }

  AdafactorGain gain(const Item& item) const {
    return adafactor_gain(*item.group, item.step, static_cast<double>(item.tensor->whole_numel),
                          sum(adafactor_sum(item.index, kSumParam)), sum(adafactor_sum(item.index, kSumUpdate)),
                          sum(adafactor_sum(item.index, kSumProduct)));
  }
};

void adafactor_step_(std::vector<Tensor> params, std::vector<Tensor> grads, std::vector<Tensor> rows,
                     std::vector<Tensor> cols, std::vector<Tensor> vectors, std::vector<Tensor> moments,
                     std::vector<Tensor> averages, Tensor steps, std::optional<Tensor> rms, Tensor lr,
                     std::vector<int64_t> group_of, std::vector<double> options, std::optional<Tensor> grad_scale,
                     std::optional<Tensor> found_inf, double max_grad_norm, bool skip_nonfinite, int64_t seed,
                     std::vector<int64_t> ids, std::optional<Tensor> sums, std::vector<int64_t> shards,
                     int64_t phases) {
  Step(AdafactorArguments{params, grads, rows,     cols,    vectors,    moments,   averages,      steps,
                          rms,    lr,    group_of, options, grad_scale, found_inf, max_grad_norm, skip_nonfinite,
                          seed,   ids,   sums,     shards,  phases});
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastnlp_ops, CPU, m) { m.impl("adafactor_step_", TORCH_BOX(&adafactor_step_)); }

}  // namespace fastnlp
