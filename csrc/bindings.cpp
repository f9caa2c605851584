// Python module reformer_ext._C. Importing it registers the operators (torch.ops.reformer); it also
// binds the functions of reformer.h, which go through the dispatcher like the operators, for
// callers that want the C++ API as it is, and says what it was built for.
#include <torch/csrc/utils/pybind.h>

#include <array>

#include "attention_options.h"
#include "plan.h"
#include "reformer.h"

namespace {

std::tuple<at::Tensor, at::Tensor> merge_attention(const std::vector<at::Tensor>& outs,
                                                   const std::vector<at::Tensor>& lses) {
  return reformer::merge_attention(outs, lses);
}

reformer::KernelPlan plan(const std::array<int64_t, 4>& shape, at::ScalarType dtype, int64_t rounds,
                          const std::vector<int64_t>& n_buckets, bool shared_qk, bool same_bucket,
                          const reformer::AttentionOptions& options, int64_t arch,
                          int64_t multiprocessors) {
  return reformer::plan({shape[0], shape[1], shape[2], shape[3], dtype, rounds, n_buckets,
                         shared_qk, same_bucket, options, arch, multiprocessors});
}

py::object build_info() { return py::module_::import("json").attr("loads")(REFORMER_BUILD_INFO); }

}  // namespace

PYBIND11_MODULE(_C, m) {
  using reformer::AttentionOptions;
  using release_gil = py::call_guard<py::gil_scoped_release>;

  py::class_<AttentionOptions> options(m, "AttentionOptions",
                                       py::metaclass((PyObject*)&PyType_Type));
  options.def(py::init<>());
  reformer::for_each_option<AttentionOptions>(
      [&](const auto& option) { options.def_readwrite(option.name, option.member); });

  m.def("lsh_hash", &reformer::lsh_hash, py::arg("x"), py::arg("rotations"), py::arg("n_buckets"),
        py::arg("key_padding_mask") = py::none(), release_gil());
  m.def("bucket_sort", &reformer::bucket_sort, py::arg("buckets"), py::arg("n_buckets"),
        release_gil());
  m.def("chunked_attention", &reformer::chunked_attention, py::arg("q"), py::arg("k"), py::arg("v"),
        py::arg("order") = py::none(), py::arg("options") = AttentionOptions(),
        py::arg("buckets") = py::none(), release_gil());
  m.def("lsh_attention", &reformer::lsh_attention, py::arg("qk"), py::arg("v"),
        py::arg("rotations"), py::arg("n_buckets"), py::arg("options") = AttentionOptions(),
        py::arg("k") = py::none(), py::arg("buckets") = py::none(), py::arg("same_bucket") = false,
        release_gil());
  m.def("lsh_cross_attention", &reformer::lsh_cross_attention, py::arg("q"), py::arg("k"),
        py::arg("v"), py::arg("rotations"), py::arg("n_buckets"),
        py::arg("options") = AttentionOptions(), py::arg("query_padding_mask") = py::none(),
        py::arg("buckets") = py::none(), py::arg("same_bucket") = false, release_gil());
  m.def("merge_attention", &merge_attention, py::arg("outs"), py::arg("lses"), release_gil());
  m.def("apply_rotary", &reformer::apply_rotary, py::arg("x"), py::arg("cos"), py::arg("sin"),
        release_gil());
  m.def("split_heads", &reformer::split_heads, py::arg("x"), py::arg("parts"), py::arg("cos"),
        py::arg("sin"), release_gil());
  m.def("merge_heads", &reformer::merge_heads, py::arg("q"), py::arg("k"), py::arg("v"),
        py::arg("cos"), py::arg("sin"), release_gil());
  m.def("next_values", &reformer::next_values, py::arg("v"), py::arg("value_mix"),
        py::arg("key_padding_mask") = py::none(), py::arg("causal") = true, release_gil());
  m.def("lsh_decode", &reformer::lsh_decode, py::arg("q"), py::arg("keys"), py::arg("values"),
        py::arg("table"), py::arg("counts"), py::arg("buckets"), py::arg("own_values") = py::none(),
        py::arg("scale") = py::none(), py::arg("correct_duplicates") = false,
        py::arg("before") = py::none(), release_gil());
  m.def("lsh_cache_append", &reformer::lsh_cache_append, py::arg("keys"), py::arg("values"),
        py::arg("table"), py::arg("counts"), py::arg("k"), py::arg("v"), py::arg("buckets"),
        py::arg("lengths"), py::arg("normalize") = false, py::arg("value_mix") = py::none(),
        py::arg("last_values") = py::none(), release_gil());
  m.def("default_n_buckets", &reformer::default_n_buckets, py::arg("length"),
        py::arg("chunk_size") = 64, release_gil());
  m.def("set_workspace_limit", &reformer::set_workspace_limit, py::arg("bytes"));
  m.def("workspace_limit", &reformer::workspace_limit);
  py::class_<reformer::KernelChoice>(m, "KernelChoice", py::metaclass((PyObject*)&PyType_Type))
      .def_readonly("kernel", &reformer::KernelChoice::kernel)
      .def_readonly("workspace", &reformer::KernelChoice::workspace)
      .def_readonly("group", &reformer::KernelChoice::group);
  py::class_<reformer::KernelPlan>(m, "KernelPlan", py::metaclass((PyObject*)&PyType_Type))
      .def_readonly("arch", &reformer::KernelPlan::arch)
      .def_readonly("multiprocessors", &reformer::KernelPlan::multiprocessors)
      .def_readonly("hash", &reformer::KernelPlan::hash)
      .def_readonly("sort", &reformer::KernelPlan::sort)
      .def_readonly("forward", &reformer::KernelPlan::forward)
      .def_readonly("backward", &reformer::KernelPlan::backward);
  m.def("plan", &plan, py::arg("shape"), py::arg("dtype"), py::arg("rounds"), py::arg("n_buckets"),
        py::arg("shared_qk"), py::arg("same_bucket"), py::arg("options"), py::arg("arch"),
        py::arg("multiprocessors"));
  m.def("build_info", &build_info,
        "What this library was built for: python, torch, cuda, cuda_archs.");
}
