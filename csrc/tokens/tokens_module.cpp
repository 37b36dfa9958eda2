// fastlm._tokens: token plans and packing on numpy arrays, for data loaders. Needs no torch and
// starts no thread, so a forked or spawned worker may use it; the GIL is free while it computes.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <memory>
#include <string>

#include "tokens/tokens.h"

namespace py = pybind11;

namespace fastlm {
namespace {

using Int64s = py::array_t<int64_t, py::array::c_style>;

std::string place(const py::array& ids, int64_t flat) {
  std::string text;
  for (py::ssize_t dim = ids.ndim() - 1; dim >= 0; --dim) {
    text = (dim ? ", " : "") + std::to_string(flat % ids.shape(dim)) + text;
    flat /= ids.shape(dim);
  }
  return "[" + text + "]";
}

// flat int64 copy; an id outside [0, size) raises IndexError with its value and position
template <typename Id>
Int64s checked(const py::array& ids, int64_t size) {
  auto source = py::array_t<Id, py::array::c_style | py::array::forcecast>::ensure(ids);
  if (!source) throw py::error_already_set();
  Int64s copy(source.size());
  const Id* from = source.data();
  int64_t* to = copy.mutable_data();
  const int64_t count = source.size();
  int64_t bad = count;
  {
    py::gil_scoped_release free;
    // one comparison for both ends: a negative id is a large unsigned one
    for (int64_t i = count - 1; i >= 0; --i) {
      to[i] = int64_t(from[i]);
      if (uint64_t(to[i]) >= uint64_t(size)) bad = i;
    }
  }
  if (bad < count) {
    throw py::index_error("fastlm.token_plan: ids must be in [0, " + std::to_string(size) +
                          "), got " + std::to_string(from[bad]) + " at " + place(ids, bad));
  }
  return copy;
}

Int64s checked_ids(const py::array& ids, int64_t size) {
  const char kind = ids.dtype().kind();
  const py::ssize_t bytes = ids.itemsize();
  if (kind == 'i' && bytes == 1) return checked<int8_t>(ids, size);
  if (kind == 'i' && bytes == 2) return checked<int16_t>(ids, size);
  if (kind == 'i' && bytes == 4) return checked<int32_t>(ids, size);
  if (kind == 'i' && bytes == 8) return checked<int64_t>(ids, size);
  if (kind == 'u' && bytes == 1) return checked<uint8_t>(ids, size);
  if (kind == 'u' && bytes == 2) return checked<uint16_t>(ids, size);
  if (kind == 'u' && bytes == 4) return checked<uint32_t>(ids, size);
  if (kind == 'u' && bytes == 8) return checked<uint64_t>(ids, size);
  throw py::type_error("fastlm.token_plan: ids must be an integer array, got " +
                       std::string(py::str(ids.dtype())));
}

py::tuple plan(const py::array& ids, int64_t num_embeddings) {
  if (num_embeddings < 0) {
    throw py::value_error("fastlm.token_plan: num_embeddings must be at least 0, got " +
                          std::to_string(num_embeddings));
  }
  Int64s inverse = checked_ids(ids, num_embeddings);
  const int64_t count = inverse.size();
  int64_t* ranks = inverse.mutable_data();
  std::unique_ptr<TokenPlan> found;
  {
    py::gil_scoped_release free;
    found = std::make_unique<TokenPlan>(ranks, count, num_embeddings);
  }
  Int64s unique(found->unique_size()), offsets(found->unique_size() + 1), order(count);
  int64_t *to_unique = unique.mutable_data(), *to_offsets = offsets.mutable_data(),
          *to_order = order.mutable_data();
  {
    py::gil_scoped_release free;
    found->write(ranks, to_unique, ranks, to_offsets, to_order);
    found.reset();
  }
  return py::make_tuple(unique, inverse, offsets, order);
}

py::tuple fit(const Int64s& lengths, int64_t capacity) {
  const int64_t count = lengths.size();
  const int64_t* from = lengths.data();
  for (int64_t i = 0; i < count; ++i) {
    if (from[i] < 0 || from[i] > capacity) throw py::value_error("a length above the capacity");
  }
  Int64s row(count), start(count);
  int64_t *to_row = row.mutable_data(), *to_start = start.mutable_data(), rows;
  {
    py::gil_scoped_release free;
    rows = first_fit(from, count, capacity, to_row, to_start);
  }
  return py::make_tuple(row, start, rows);
}

}  // namespace
}  // namespace fastlm

PYBIND11_MODULE(_tokens, m) {
  m.doc() = "Token plans and packing on numpy arrays; see fastlm.token_plan.";
  m.def("plan", &fastlm::plan, py::arg("ids"), py::arg("num_embeddings"),
        "(unique, inverse, offsets, order) of an integer array, all int64.");
  m.def("first_fit", &fastlm::fit, py::arg("lengths"), py::arg("capacity"),
        "(row, start) of each document and the number of rows.");
}
