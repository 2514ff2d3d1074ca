// fastnlp_ops._host: work on small integer arrays that belongs to the host. NumPy in, NumPy out, no torch.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

namespace py = pybind11;

namespace {

using Ints = py::array_t<int64_t, py::array::c_style | py::array::forcecast>;
using Bools = py::array_t<bool, py::array::c_style | py::array::forcecast>;

// What a tag says of its step, whatever letters a scheme has for it: M is inside, L is end, U is single.
enum Role : int64_t { outside, begin, inside, end, single, role_count };

// The three families of schemes; fastnlp_ops/tag_schemes.py describes them.
enum Scheme : int64_t { bio, iob1, bioes };

// May a step of role `from` be followed by one of role `to`? `same` says whether the two have the same type.
bool follows(Scheme scheme, int64_t from, int64_t to, bool same) {
  switch (scheme) {
    case bio: return to != inside || (from != outside && same);
    case iob1: return to != begin || (from != outside && same);
    case bioes: {
      bool open = from == begin || from == inside;
      bool continues = to == inside || to == end;
      return open ? continues && same : !continues;
    }
  }
  return false;
}

bool starts_sequence(Scheme scheme, int64_t role) {
  if (scheme == iob1) return role != begin;
  return role == outside || role == begin || role == single;
}

bool ends_sequence(Scheme scheme, int64_t role) { return scheme != bioes || (role != begin && role != inside); }

py::tuple transition_table(const Ints& roles, const Ints& types, int64_t scheme) {
  py::ssize_t n = roles.size();
  Bools allowed({n, n}), starts(n), ends(n);
  const int64_t *role = roles.data(), *type = types.data();
  bool *allow = allowed.mutable_data(), *start = starts.mutable_data(), *finish = ends.mutable_data();
  {
    py::gil_scoped_release release;
    auto kind = static_cast<Scheme>(scheme);
    for (py::ssize_t i = 0; i < n; ++i) {
      start[i] = starts_sequence(kind, role[i]);
      finish[i] = ends_sequence(kind, role[i]);
      for (py::ssize_t j = 0; j < n; ++j) allow[i * n + j] = follows(kind, role[i], role[j], type[i] == type[j]);
    }
  }
  return py::make_tuple(allowed, starts, ends);
}

struct Span {
  int64_t sequence, start, end, type;
};

// Reads one sequence as conlleval does: a step opens a span, or it continues the one before it. `mask` holds bytes: a
// bool array may hold any, and all but 0 are true.
void read_spans(const int64_t* tags, const uint8_t* mask, int64_t steps, int64_t sequence, const int64_t* roles,
                const int64_t* types, int64_t n, std::vector<Span>& spans) {
  int64_t previous = outside;
  for (int64_t t = 0; t < steps; ++t) {
    int64_t tag = tags[t];
    if (mask ? !mask[t] : tag < 0) continue;
    if (tag < 0 || tag >= n) {
      throw std::invalid_argument("tags must be in [0, " + std::to_string(n) + "), got tag " + std::to_string(tag) +
                                  " at sequence " + std::to_string(sequence) + ", step " + std::to_string(t));
    }
    int64_t role = roles[tag];
    bool open = previous == begin || previous == inside;
    if (role == inside || role == end) {
      if (open && spans.back().type == types[tag]) {
        spans.back().end = t;
      } else {
        spans.push_back({sequence, t, t, types[tag]});
      }
    } else if (role != outside) {
      spans.push_back({sequence, t, t, types[tag]});
    }
    previous = role;
  }
}

// tags [B, T] -> [M, 4]: sequence, start, end (inclusive), type
Ints tags_to_spans(const Ints& tags, const Ints& roles, const Ints& types, const py::object& mask) {
  py::ssize_t batch = tags.shape(0), steps = tags.shape(1);
  Bools on;
  const uint8_t* mask_data = nullptr;
  if (!mask.is_none()) {
    on = mask.cast<Bools>();
    if (on.ndim() != 2 || on.shape(0) != batch || on.shape(1) != steps) {
      throw std::invalid_argument("mask must have the shape of tags");
    }
    mask_data = reinterpret_cast<const uint8_t*>(on.data());
  }
  std::vector<Span> spans;
  const int64_t *tag = tags.data(), *role = roles.data(), *type = types.data();
  int64_t n = roles.size();
  {
    py::gil_scoped_release release;
    for (py::ssize_t b = 0; b < batch; ++b) {
      read_spans(tag + b * steps, mask_data ? mask_data + b * steps : nullptr, steps, b, role, type, n, spans);
    }
  }
  Ints result({static_cast<py::ssize_t>(spans.size()), py::ssize_t(4)});
  int64_t* out = result.mutable_data();
  for (const Span& span : spans) {
    for (int64_t value : {span.sequence, span.start, span.end, span.type}) *out++ = value;
  }
  return result;
}

std::string text(int64_t start, int64_t finish) {
  return "(" + std::to_string(start) + ", " + std::to_string(finish) + ")";
}

// spans [M, 3] (start, end, type) -> tags [length]. `ids` [types, role_count] holds the tag of each type and role, -1
// where the labels have none; outside_id likewise.
Ints spans_to_tags(const Ints& spans, int64_t length, const Ints& ids, int64_t outside_id, int64_t scheme) {
  py::ssize_t count = spans.shape(0);
  int64_t types = ids.shape(0);
  const int64_t *span = spans.data(), *id = ids.data();
  std::vector<py::ssize_t> order(count);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](auto a, auto b) { return span[3 * a] < span[3 * b]; });

  Ints tags(length);
  int64_t* tag = tags.mutable_data();
  std::fill(tag, tag + length, outside_id);
  int64_t covered = 0, previous_type = -1;  // steps before `covered` are written
  auto need_outside = [&](int64_t step, int64_t until) {
    if (step < until && outside_id < 0) {
      throw std::invalid_argument("labels have no O, but step " + std::to_string(step) + " lies in no span");
    }
  };
  for (py::ssize_t k : order) {
    int64_t start = span[3 * k], finish = span[3 * k + 1], type = span[3 * k + 2];
    if (start < 0 || finish < start || finish >= length) {
      throw std::invalid_argument("spans must have 0 <= start <= end < " + std::to_string(length) + ", got " +
                                  text(start, finish));
    }
    if (type < 0 || type >= types) {
      throw std::invalid_argument("span types must be in [0, " + std::to_string(types) + "), got " +
                                  std::to_string(type));
    }
    if (start < covered) throw std::invalid_argument("spans must not overlap, got one more on " + text(start, finish));
    need_outside(covered, start);
    for (int64_t t = start; t <= finish; ++t) {
      Role role = inside;
      if (scheme == bioes) {
        role = start == finish ? single : t == start ? begin : t == finish ? end : inside;
      } else if (t == start) {
        bool touches = start == covered && start > 0 && previous_type == type;
        role = scheme == bio || touches ? begin : inside;
      }
      tag[t] = id[type * role_count + role];
      if (tag[t] < 0) {
        throw std::invalid_argument("labels have no tag for step " + std::to_string(t) + " of span " +
                                    text(start, finish));
      }
    }
    covered = finish + 1;
    previous_type = type;
  }
  need_outside(covered, length);
  return tags;
}

// The rows of paths [B, T] as Python lists, without the negative entries. Lists are made at their size and filled with
// PyList_SET_ITEM; integers up to 256 come from the interpreter's cache.
py::list paths_to_lists(const Ints& paths) {
  py::ssize_t batch = paths.shape(0), steps = paths.shape(1);
  py::list result(batch);
  for (py::ssize_t b = 0; b < batch; ++b) {
    const int64_t* path = paths.data() + b * steps;
    py::ssize_t length = std::count_if(path, path + steps, [](int64_t tag) { return tag >= 0; });
    PyObject* list = PyList_New(length);
    if (!list) throw py::error_already_set();
    PyList_SET_ITEM(result.ptr(), b, list);  // `result` owns it from here on, also if an integer below cannot be made
    for (py::ssize_t t = 0, k = 0; k < length; ++t) {
      if (path[t] < 0) continue;
      PyObject* tag = PyLong_FromLongLong(path[t]);
      if (!tag) throw py::error_already_set();
      PyList_SET_ITEM(list, k++, tag);
    }
  }
  return result;
}

// lengths [B] -> (order [B], cu_seqlens [B + 1]): sequences longest first, equal ones by index, and their boundaries
// when they are packed in that order.
py::tuple packing_plan(const Ints& lengths) {
  py::ssize_t batch = lengths.size();
  const int64_t* length = lengths.data();
  Ints order(batch), cu_seqlens(batch + 1);
  int64_t *index = order.mutable_data(), *boundary = cu_seqlens.mutable_data();
  {
    py::gil_scoped_release release;
    for (py::ssize_t b = 0; b < batch; ++b) {
      if (length[b] < 0) throw std::invalid_argument("lengths must be at least 0, got " + std::to_string(length[b]));
    }
    std::iota(index, index + batch, 0);
    std::stable_sort(index, index + batch, [&](int64_t a, int64_t b) { return length[a] > length[b]; });
    boundary[0] = 0;
    for (py::ssize_t b = 0; b < batch; ++b) boundary[b + 1] = boundary[b] + length[index[b]];
  }
  return py::make_tuple(order, cu_seqlens);
}

const char* cpu_features() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("x86-64-v3")) return "x86-64-v3";
#endif
  return "baseline";
}

}  // namespace

PYBIND11_MODULE(_host, m) {
  m.def("transition_table", &transition_table, py::arg("roles"), py::arg("types"), py::arg("scheme"));
  m.def("tags_to_spans", &tags_to_spans, py::arg("tags"), py::arg("roles"), py::arg("types"), py::arg("mask"));
  m.def("spans_to_tags", &spans_to_tags, py::arg("spans"), py::arg("length"), py::arg("ids"), py::arg("outside_id"),
        py::arg("scheme"));
  m.def("paths_to_lists", &paths_to_lists, py::arg("paths"));
  m.def("packing_plan", &packing_plan, py::arg("lengths"));
  m.def("cpu_features", &cpu_features);
}
