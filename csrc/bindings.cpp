// Python bindings: argument checks and m.def lines. Tensors come as addresses and sizes, so that the
// extension needs no torch; lipfast.ops checks dtype, layout and device before.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <stdexcept>
#include <string>
#include <vector>

#if defined(_OPENMP)
#include <omp.h>
#endif

#include "aol_rescale.h"
#include "cayley.h"
#include "gram_bound.h"
#include "maxmin.h"
#include "polar.h"
#include "skew_exp.h"

namespace py = pybind11;
using namespace lipfast;

namespace {

template <typename T>
T* address(uintptr_t value) {
  return reinterpret_cast<T*>(value);
}

void check(bool holds, const std::string& what) {
  if (!holds) throw std::invalid_argument(what);
}

MaxMinParams maxmin_params(uintptr_t x, uintptr_t y, uintptr_t mask, int64_t batch,
                           int64_t channels, int64_t spatial, bool channels_last, int dtype) {
  check(batch >= 0 && channels >= 0 && spatial >= 0, "maxmin: sizes must not be negative");
  check(dtype >= 0 && dtype <= 3, "maxmin: dtype must be 0 (float64), 1 (float32), 2 (bfloat16) or "
                                  "3 (float16), got " + std::to_string(dtype));
  MaxMinParams params{address<const void>(x), address<void>(y), address<uint8_t>(mask), batch,
                      channels, spatial, channels_last, static_cast<DType>(dtype)};
  const bool empty = batch * channels * spatial == 0;
  check(empty || (x && y), "maxmin: x and y must not be null");
  check(params.pairs() == 0 || mask, "maxmin: mask must not be null");
  return params;
}

GramBoundParams gram_bound_params(uintptr_t taps, uintptr_t a, uintptr_t q, uintptr_t signs,
                                  uintptr_t out, int64_t batch, int64_t channels, int64_t depth,
                                  int kh, int kw, bool is_double) {
  check(batch >= 0 && channels >= 0 && depth >= 0, "gram_bound: sizes must not be negative");
  check(kh >= 1 && kw >= 1, "gram_bound: kh and kw must be positive");
  const bool empty = batch * channels * depth == 0;
  check(empty || (q && signs && out), "gram_bound: q, signs and out must not be null");
  return {address<const void>(taps), address<const void>(a), address<const void>(q),
          address<int8_t>(signs), address<void>(out), batch, channels, depth, kh, kw, is_double};
}

SkewExpParams skew_exp_params(uintptr_t x, uintptr_t taps, uintptr_t out, uintptr_t terms,
                              int64_t batch, int channels, int height, int width, int kh, int kw,
                              bool circular, bool channels_last, int dtype,
                              bool tensor_cores, double a0,
                              const std::vector<double>& ratios) {
  check(batch >= 0 && channels >= 0 && height >= 0 && width >= 0,
        "skew_exp: sizes must not be negative");
  check(kh >= 1 && kh % 2 && kw >= 1 && kw % 2, "skew_exp: kh and kw must be odd");
  check(dtype >= 0 && dtype <= 2, "skew_exp: dtype must be 0 (float64), 1 (float32) or 2 "
                                  "(bfloat16), got " + std::to_string(dtype));
  check(!ratios.empty() && ratios.size() <= kSkewExpMaxTerms,
        "skew_exp: there must be 1 to " + std::to_string(kSkewExpMaxTerms) + " ratios, got " +
            std::to_string(ratios.size()));
  const bool empty = batch * channels * height * width == 0;
  check(empty || (x && taps && out), "skew_exp: only terms may be null");
  SkewExpParams params{address<const void>(x), address<const void>(taps), address<void>(out),
                       address<void>(terms), batch, channels, height, width, kh, kw,
                       int(ratios.size()), circular, channels_last, static_cast<DType>(dtype),
                       tensor_cores, a0, {}};
  for (size_t k = 0; k < ratios.size(); ++k) params.ratios[k] = ratios[k];
  return params;
}

AolRescaleParams aol_rescale_params(uintptr_t weight, uintptr_t r, uintptr_t scaled,
                                    uintptr_t grad_weight, uintptr_t partial, int64_t n,
                                    int64_t rows, int64_t channels, int64_t taps,
                                    bool channels_last, bool is_double, int dtype) {
  check(n >= 0 && rows >= 0 && channels >= 0 && taps >= 0,
        "aol_rescale: sizes must not be negative");
  check(dtype >= 0 && dtype <= 3, "aol_rescale: dtype must be 0 to 3, got " + std::to_string(dtype));
  const bool empty = n * rows * channels * taps == 0;
  check(empty || (weight && r && scaled), "aol_rescale: weight, r and scaled must not be null");
  return {address<const void>(weight), address<const void>(r), address<void>(scaled),
          address<void>(grad_weight), address<void>(partial), n, rows, channels, taps,
          channels_last, is_double, static_cast<DType>(dtype)};
}

CayleyParams cayley_params(uintptr_t matrix, uintptr_t other, uintptr_t out, int64_t batch,
                           int64_t rows, int64_t n, int parts, bool is_double) {
  check(batch >= 0 && n >= 0 && rows >= n, "cayley: sizes must not be negative, rows at least n");
  check(parts == 1 || parts == 2, "cayley: parts must be 1 or 2, got " + std::to_string(parts));
  check(batch * n == 0 || (matrix && out), "cayley: matrix and out must not be null");
  return {address<const void>(matrix), address<const void>(other), address<void>(out), batch, rows,
          n, parts, is_double};
}

PolarParams polar_params(uintptr_t x, uintptr_t grad, uintptr_t w, uintptr_t out, int64_t batch,
                         int planes, int rows, int columns, int steps,
                         const std::vector<std::array<double, 3>>& schedule) {
  check(batch >= 0, "polar: batch must not be negative");
  check(planes == 1 || planes == 2, "polar: planes must be 1 or 2");
  check(1 <= rows && rows <= kPolarMaxRows && rows <= columns,
        "polar: rows must be at most " + std::to_string(kPolarMaxRows) + " and at most columns");
  check(steps >= 1, "polar: steps must be positive");
  check(schedule.empty() || (int(schedule.size()) == steps && steps <= kPolarMaxSteps),
        "polar: a schedule has at most " + std::to_string(kPolarMaxSteps) + " steps");
  check(batch == 0 || (x && w && out), "polar: only grad may be null");
  PolarParams params{address<const float>(x), address<const float>(grad), address<float>(w),
                     address<float>(out), batch, planes, rows, columns, steps, {}};
  for (size_t i = 0; i < schedule.size(); ++i) {
    std::copy(schedule[i].begin(), schedule[i].end(), params.schedule[i]);
  }
  return params;
}

int openmp_threads() {
#if defined(_OPENMP)
  return omp_get_max_threads();
#else
  return 0;
#endif
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "C++ and CUDA kernels of lipfast";
  m.def("openmp_threads", &openmp_threads, "Threads the CPU kernels use; 0 without OpenMP.");

  py::class_<MaxMinParams>(m, "MaxMinParams")
      .def(py::init(&maxmin_params), py::arg("x"), py::arg("y"), py::arg("mask"), py::arg("batch"),
           py::arg("channels"), py::arg("spatial"), py::arg("channels_last"), py::arg("dtype"));
  py::call_guard<py::gil_scoped_release> no_gil;
  m.def("maxmin_forward_cpu", &maxmin_forward_cpu, no_gil);
  m.def("maxmin_backward_cpu", &maxmin_backward_cpu, no_gil);

  py::class_<GramBoundParams>(m, "GramBoundParams")
      .def(py::init(&gram_bound_params), py::arg("taps"), py::arg("a"), py::arg("q"),
           py::arg("signs"), py::arg("out"), py::arg("batch"), py::arg("channels"),
           py::arg("depth"), py::arg("kh"), py::arg("kw"), py::arg("is_double"));
  m.attr("gram_bound_tile") = kGramBoundTile;
  py::enum_<GramBoundProducts>(m, "GramBoundProducts")
      .value("ALL_TAPS", GramBoundProducts::kAllTaps)
      .value("ROWS", GramBoundProducts::kRows)
      .value("SUMMED", GramBoundProducts::kSummed);
  m.def("gram_bound_forward_cpu", [](const GramBoundParams& params, GramBoundProducts kind) {
    check(params.taps, "gram_bound: taps must not be null");
    gram_bound_forward_cpu(params, kind);
  }, no_gil);
  m.def("gram_bound_backward_cpu", [](const GramBoundParams& params, bool matrix) {
    check(params.a, "gram_bound: a must not be null");
    gram_bound_backward_cpu(params, matrix);
  }, no_gil);

  py::class_<AolRescaleParams>(m, "AolRescaleParams")
      .def(py::init(&aol_rescale_params), py::arg("weight"), py::arg("r"), py::arg("scaled"),
           py::arg("grad_weight"), py::arg("partial"), py::arg("n"), py::arg("rows"),
           py::arg("channels"), py::arg("taps"), py::arg("channels_last"), py::arg("is_double"),
           py::arg("dtype"));
  m.attr("aol_rescale_rows") = kAolRescaleRows;
  m.def("aol_rescale_forward_cpu", &aol_rescale_forward_cpu, no_gil);
  m.def("aol_rescale_backward_cpu", [](const AolRescaleParams& params) {
    check(params.grad_weight && params.partial,
          "aol_rescale: grad_weight and partial must not be null");
    aol_rescale_backward_cpu(params);
  }, no_gil);

  py::class_<CayleyParams>(m, "CayleyParams")
      .def(py::init(&cayley_params), py::arg("matrix"), py::arg("other"), py::arg("out"),
           py::arg("batch"), py::arg("rows"), py::arg("n"), py::arg("parts"), py::arg("is_double"));
  m.def("cayley_forward_cpu", &cayley_forward_cpu, no_gil);
  m.def("cayley_backward_cpu", [](const CayleyParams& params) {
    check(params.batch * params.n == 0 || params.other, "cayley: other must not be null");
    check(params.rows == params.n, "cayley: the backward pass takes square matrices");
    cayley_backward_cpu(params);
  }, no_gil);

  py::class_<PolarParams>(m, "PolarParams")
      .def(py::init(&polar_params), py::arg("x"), py::arg("grad"), py::arg("w"), py::arg("out"),
           py::arg("batch"), py::arg("planes"), py::arg("rows"), py::arg("columns"),
           py::arg("steps"), py::arg("schedule"));
  m.attr("polar_max_rows") = kPolarMaxRows;
  m.attr("polar_max_steps") = kPolarMaxSteps;
  m.def("polar_shared_bytes", &polar_shared_bytes);
  py::class_<SkewExpParams>(m, "SkewExpParams")
      .def(py::init(&skew_exp_params), py::arg("x"), py::arg("taps"), py::arg("out"),
           py::arg("terms"), py::arg("batch"), py::arg("channels"), py::arg("height"),
           py::arg("width"), py::arg("kh"), py::arg("kw"), py::arg("circular"),
           py::arg("channels_last"), py::arg("dtype"), py::arg("tensor_cores"), py::arg("a0"),
           py::arg("ratios"));
  m.attr("skew_exp_max_terms") = kSkewExpMaxTerms;
  m.attr("skew_exp_each") = kSkewExpEach;
  m.attr("skew_exp_tile") = kSkewExpTile;
  m.def("skew_exp_shared_bytes",
        [](int channels, int height, int width, int dtype, bool tensor_cores) {
          return skew_exp_shared_bytes(channels, height, width, static_cast<DType>(dtype),
                                       tensor_cores);
        });

#if defined(LIPFAST_CUDA_ARCHS)
  m.attr("cuda_archs") = LIPFAST_CUDA_ARCHS;
  m.attr("cuda_version") = LIPFAST_CUDA_VERSION;
  m.attr("cuda_absent") = py::none();
  m.def("maxmin_forward_cuda", [](const MaxMinParams& params, uintptr_t stream) {
    maxmin_forward_cuda(params, address<CUstream_st>(stream));
  }, no_gil);
  m.def("maxmin_backward_cuda", [](const MaxMinParams& params, uintptr_t stream) {
    maxmin_backward_cuda(params, address<CUstream_st>(stream));
  }, no_gil);
  m.def("gram_bound_forward_cuda", [](const GramBoundParams& params, uintptr_t stream) {
    check(params.taps, "gram_bound: taps must not be null");
    gram_bound_forward_cuda(params, address<CUstream_st>(stream));
  }, no_gil);
  m.def("gram_bound_backward_cuda", [](const GramBoundParams& params, uintptr_t stream) {
    check(params.taps && params.a, "gram_bound: taps and a must not be null");
    gram_bound_backward_cuda(params, address<CUstream_st>(stream));
  }, no_gil);
  m.def("skew_exp_forward_cuda", [](const SkewExpParams& params, uintptr_t stream) {
    skew_exp_forward_cuda(params, address<CUstream_st>(stream));
  }, no_gil);
  m.def("skew_exp_backward_cuda", [](const SkewExpParams& params, uintptr_t stream) {
    check(params.terms, "skew_exp: terms must not be null");
    skew_exp_backward_cuda(params, address<CUstream_st>(stream));
  }, no_gil);
  m.def("aol_rescale_forward_cuda", [](const AolRescaleParams& params, uintptr_t stream) {
    aol_rescale_forward_cuda(params, address<CUstream_st>(stream));
  }, no_gil);
  m.def("aol_rescale_backward_cuda", [](const AolRescaleParams& params, uintptr_t stream) {
    check(params.grad_weight && params.partial,
          "aol_rescale: grad_weight and partial must not be null");
    aol_rescale_backward_cuda(params, address<CUstream_st>(stream));
  }, no_gil);
  m.def("polar_forward_cuda", [](const PolarParams& params, uintptr_t stream) {
    polar_forward_cuda(params, address<CUstream_st>(stream));
  }, no_gil);
  m.def("polar_backward_cuda", [](const PolarParams& params, uintptr_t stream) {
    check(params.batch == 0 || params.grad, "polar: grad must not be null");
    polar_backward_cuda(params, address<CUstream_st>(stream));
  }, no_gil);
  m.def("polar_shared_limit", &polar_shared_limit);
#else
  m.attr("cuda_archs") = "";
  m.attr("cuda_version") = py::none();
  m.attr("cuda_absent") = LIPFAST_CUDA_ABSENT;
#endif
}
