// The Python door of the CUDA code: what bindings_cpu.cpp is for the CPU. It holds no kernel, so the C++ compiler
// builds it. The module loads where there is no driver; its calls then raise the driver's error.
#include <cuda_runtime_api.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "draft_verification/binding.hpp"
#include "draft_verification/cuda.hpp"
#include "importance_resampling/binding.hpp"
#include "importance_resampling/cuda.hpp"
#include "thought_attention/binding.hpp"
#include "thought_attention/cuda.hpp"

namespace py = pybind11;

namespace {

using namespace pyquiet;

std::string in_words(cudaError_t error) {
  return std::string(cudaGetErrorName(error)) + ": " + cudaGetErrorString(error);
}

void check(int status) {
  const auto error = static_cast<cudaError_t>(status);
  if (error == cudaSuccess) return;
  if (error == cudaErrorInsufficientDriver || error == cudaErrorNoKernelImageForDevice ||
      error == cudaErrorUnsupportedPtxVersion)
    throw std::runtime_error("pyquiet's CUDA kernels do not run on this GPU and driver (" + in_words(error) +
                             "); `pyquiet doctor` tells what they are built for");
  throw std::runtime_error("a CUDA call failed (" + in_words(error) +
                           "); an earlier kernel may be the cause: CUDA_LAUNCH_BLOCKING=1 shows which");
}

int gpu_of(py::handle tensor) { return tensor.attr("get_device")().cast<int>(); }  // -1 on the CPU

template <size_t N>
bool share_a_gpu(const std::array<py::handle, N>& tensors) {
  const int gpu = gpu_of(tensors[0]);
  for (py::handle tensor : tensors)
    if (!tensor.is_none() && gpu_of(tensor) != gpu) return false;
  return gpu >= 0;
}

// Kernels are launched on the current GPU. To change it is left to torch, which knows how to change back without
// waking a GPU that nobody uses.
void check_current_gpu(py::handle query) {
  int current = 0;
  check(cudaGetDevice(&current));
  if (current != gpu_of(query)) throw std::logic_error("the tensors' GPU is not current: call under torch.cuda.device");
}

template <class E>
bool forward_as(const ThoughtArguments& arguments, py::handle out, py::handle lse, uintptr_t stream) {
  ThoughtAttention<E> a;
  if (!read_forward(arguments, out, lse, Device::cuda, a)) return false;
  check_current_gpu(arguments.query);
  py::gil_scoped_release release;
  check(thought_attention_forward_cuda<E>(a, reinterpret_cast<void*>(stream)));
  return true;
}

// False, with nothing written, where an argument breaks the contract; Python then says which and how.
bool thought_attention(py::handle query, py::handle text_key, py::handle text_value, py::handle path_key,
                       py::handle path_value, py::handle text_limits, py::handle text_start, double scale,
                       py::handle window, py::handle softcap, py::handle out, py::handle lse, uintptr_t stream) {
  if (!share_a_gpu(std::array{query, text_key, text_value, path_key, path_value, text_limits, text_start, out, lse}))
    return false;
  const ThoughtArguments a{query,       text_key,   text_value, path_key, path_value,
                           text_limits, text_start, scale,      window,   softcap};
  return forward_as<float>(a, out, lse, stream) || forward_as<BFloat16>(a, out, lse, stream) ||
         forward_as<Float16>(a, out, lse, stream);
}

template <class E>
bool backward_as(const ThoughtArguments& arguments, const std::array<py::handle, 3>& saved,
                 const std::array<py::handle, 5>& gradients, py::handle workspace, uintptr_t stream) {
  ThoughtAttentionBackward<E> a;
  View<float, 1> space;
  if (!read_backward(arguments, saved, gradients, Device::cuda, a) || !read_tensor(workspace, space, Device::cuda))
    return false;
  const auto [B, H, T, Q, D] = a.query.shape;
  const int64_t G = a.text_key.shape[1], S = a.text_key.shape[2], P = a.path_key.shape[3];
  if (!has_shape<float, 1>(space, {thought_attention_backward_workspace(B, H, T, Q, G, S, P)})) return false;
  check_current_gpu(arguments.query);
  py::gil_scoped_release release;
  check(thought_attention_backward_cuda<E>(a, space.data, reinterpret_cast<void*>(stream)));
  return true;
}

bool thought_attention_backward(py::handle query, py::handle text_key, py::handle text_value, py::handle path_key,
                                py::handle path_value, py::handle text_limits, py::handle text_start, double scale,
                                py::handle window, py::handle softcap, py::handle out, py::handle d_out, py::handle lse,
                                py::handle d_query, py::handle d_text_key, py::handle d_text_value,
                                py::handle d_path_key, py::handle d_path_value, py::handle workspace,
                                uintptr_t stream) {
  if (!share_a_gpu(std::array{query, text_key, text_value, path_key, path_value, text_limits, text_start, out, d_out,
                              lse, d_query, d_text_key, d_text_value, d_path_key, d_path_value, workspace}))
    return false;
  const ThoughtArguments a{query,       text_key,   text_value, path_key, path_value,
                           text_limits, text_start, scale,      window,   softcap};
  const std::array<py::handle, 3> saved{out, d_out, lse};
  const std::array<py::handle, 5> gradients{d_query, d_text_key, d_text_value, d_path_key, d_path_value};
  return backward_as<float>(a, saved, gradients, workspace, stream) ||
         backward_as<BFloat16>(a, saved, gradients, workspace, stream) ||
         backward_as<Float16>(a, saved, gradients, workspace, stream);
}

template <class E>
bool verify_as(const VerificationArguments& arguments, py::handle workspace, uintptr_t stream) {
  DraftVerification<E> a;
  View<float, 1> space;
  if (!read_verification(arguments, Device::cuda, a) || !read_tensor(workspace, space, Device::cuda)) return false;
  const auto [B, rows, V] = a.target.shape;
  if (!has_shape(space, {verify_draft_workspace(B, a.draft_tokens.shape[1], rows, V)})) return false;
  check_current_gpu(arguments.target);
  py::gil_scoped_release release;
  check(verify_draft_cuda<E>(a, space.data, reinterpret_cast<void*>(stream)));
  return true;
}

// Faults are in `fault` once the device has come to it.
bool verify_draft(py::handle target, py::handle draft, py::handle draft_tokens, py::handle draft_lse, py::handle banned,
                  py::handle lengths, py::handle sequence, py::handle position, py::handle step, py::handle index,
                  const std::array<int64_t, 4>& words, int64_t seed, double temperature, double draft_temperature,
                  py::handle top_k, py::handle top_p, bool first_is_exact, bool gumbel, bool deterministic,
                  py::handle tokens, py::handle count, py::handle accepted, py::handle log_probs, py::handle bonus,
                  py::handle fault, py::handle workspace, uintptr_t stream) {
  if (!share_a_gpu(std::array{target, draft, draft_tokens, draft_lse, banned, lengths, sequence, position, step, index,
                              tokens, count, accepted, log_probs, bonus, fault, workspace}))
    return false;
  const VerificationArguments a{target,
                                draft,
                                draft_tokens,
                                draft_lse,
                                lengths,
                                {{sequence, position, step, index}, words, static_cast<uint64_t>(seed), 0},
                                {banned, temperature, top_k, top_p},
                                draft_temperature,
                                first_is_exact,
                                gumbel,
                                deterministic,
                                {tokens, count, accepted, log_probs, bonus, fault}};
  return verify_as<float>(a, workspace, stream) || verify_as<BFloat16>(a, workspace, stream) ||
         verify_as<Float16>(a, workspace, stream);
}

template <class E>
bool draw_as(const CandidateArguments& arguments, py::handle workspace, uintptr_t stream) {
  CandidateDraw<E> a;
  View<float, 1> space;
  if (!read_candidates(arguments, Device::cuda, a) || !read_tensor(workspace, space, Device::cuda)) return false;
  if (!has_shape(space, {draw_candidates_workspace(a.logits.shape[0], a.logits.shape[1])})) return false;
  check_current_gpu(arguments.logits);
  py::gil_scoped_release release;
  check(draw_candidates_cuda<E>(a, space.data, reinterpret_cast<void*>(stream)));
  return true;
}

// Faults are in `fault` once the device has come to it.
bool draw_candidates(py::handle logits, py::handle banned, py::handle sequence, py::handle position, py::handle step,
                     py::handle index, const std::array<int64_t, 4>& words, int64_t seed, uint32_t purpose, int64_t k,
                     double temperature, py::handle top_k, py::handle top_p, bool deterministic, py::handle tokens,
                     py::handle log_probs, py::handle log_base, py::handle lse, py::handle fault, py::handle workspace,
                     uintptr_t stream) {
  if (!share_a_gpu(std::array{logits, banned, sequence, position, step, index, tokens, log_probs, log_base, lse, fault,
                              workspace}))
    return false;
  const CandidateArguments a{logits,
                             {{sequence, position, step, index}, words, static_cast<uint64_t>(seed), purpose},
                             {banned, temperature, top_k, top_p},
                             k,
                             false,
                             deterministic,
                             tokens,
                             log_probs,
                             log_base,
                             lse,
                             py::none(),
                             fault};
  return draw_as<float>(a, workspace, stream) || draw_as<BFloat16>(a, workspace, stream) ||
         draw_as<Float16>(a, workspace, stream);
}

std::vector<std::string> architectures() { return {PYQUIET_CUDA_ARCHITECTURES}; }

// 13000 is CUDA 13.0; 0 is no driver.
int driver_version() {
  int version = 0;
  cudaDriverGetVersion(&version);
  return version;
}

// Name and compute capability of every GPU; without one, the driver's words are raised.
std::vector<std::pair<std::string, std::pair<int, int>>> gpus() {
  const auto check = [](cudaError_t error) {
    if (error != cudaSuccess) throw std::runtime_error(in_words(error));
  };
  int count = 0;
  check(cudaGetDeviceCount(&count));
  std::vector<std::pair<std::string, std::pair<int, int>>> found;
  for (int gpu = 0; gpu < count; ++gpu) {
    cudaDeviceProp properties;
    check(cudaGetDeviceProperties(&properties, gpu));
    found.push_back({properties.name, {properties.major, properties.minor}});
  }
  return found;
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "CUDA kernels of pyquiet. Get it from pyquiet.native.cuda(), which loads it at the first call.";
  m.def("architectures", &architectures, "What the kernels are compiled for: sm_90a is machine code, compute_100 PTX.");
  m.def("runtime_version", [] { return CUDART_VERSION; }, "13000 is CUDA 13.0.");
  m.def("driver_version", &driver_version);
  m.def("gpus", &gpus);
  m.def("thought_attention", &thought_attention);
  m.def("thought_attention_backward", &thought_attention_backward);
  m.def("thought_attention_backward_workspace", &thought_attention_backward_workspace, "How many floats it needs.");
  m.def("draw_candidates", &draw_candidates);
  m.def("draw_candidates_workspace", &draw_candidates_workspace, "How many floats it needs.");
  m.def("verify_draft", &verify_draft);
  m.def("verify_draft_workspace", &verify_draft_workspace, "How many floats it needs.");
}
