// Runs the CUDA kernels of thought attention on one problem, on the CPU, in two orders of the threads that must give
// the same bits:
//   thought_attention <problem> <result>
// The problem is what read_problem reads; the result the storages of the tensors that were written, by name.
#include <fstream>
#include <map>
#include <string>

#include "../../csrc/thought_attention/cuda.cu"

namespace {

using namespace pyquiet;

struct Tensor {
  std::vector<int64_t> shape, stride;
  int64_t offset = 0;
  std::vector<char> storage;  // exactly as large as in Python, so that AddressSanitizer sees an overrun

  template <class T, int N>
  void give(View<T, N>& view) {
    if (shape.size() != N) shim::fail("a tensor has another number of dimensions than the contract says");
    view.data = reinterpret_cast<T*>(storage.data()) + offset;
    std::copy(shape.begin(), shape.end(), view.shape.begin());
    std::copy(stride.begin(), stride.end(), view.stride.begin());
  }
};

struct Problem {
  int64_t element = 0, backward = 0, window = 0;
  double scale = 0, softcap = 0;
  std::map<std::string, Tensor> tensors;
};

template <class T>
T read(std::istream& from) {
  T value;
  from.read(reinterpret_cast<char*>(&value), sizeof value);
  return value;
}

Problem read_problem(const char* path) {
  std::ifstream from(path, std::ios::binary);
  from.exceptions(std::ios::failbit | std::ios::badbit);
  Problem problem;
  problem.element = read<int64_t>(from);
  problem.backward = read<int64_t>(from);
  problem.window = read<int64_t>(from);
  problem.scale = read<double>(from);
  problem.softcap = read<double>(from);
  for (int64_t n = read<int64_t>(from); n > 0; --n) {
    std::string name(read<int64_t>(from), ' ');
    from.read(name.data(), name.size());
    Tensor& tensor = problem.tensors[name];
    tensor.shape.resize(read<int64_t>(from));
    tensor.stride.resize(tensor.shape.size());
    for (auto* sizes : {&tensor.shape, &tensor.stride})
      for (int64_t& size : *sizes) size = read<int64_t>(from);
    tensor.offset = read<int64_t>(from);
    tensor.storage.resize(read<int64_t>(from));
    from.read(tensor.storage.data(), tensor.storage.size());
  }
  return problem;
}

template <class E>
void give_inputs(Problem& problem, ThoughtInputs<E>& a) {
  auto& t = problem.tensors;
  t["query"].give(a.query);
  t["text_key"].give(a.text_key);
  t["text_value"].give(a.text_value);
  t["path_key"].give(a.path_key);
  t["path_value"].give(a.path_value);
  t["text_limits"].give(a.text_limits);
  if (t.count("text_start")) t["text_start"].give(a.text_start);
  a.scale = static_cast<float>(problem.scale);
  a.softcap = static_cast<float>(problem.softcap);
  a.window = problem.window;
}

template <class E>
int run_backward(Problem& problem) {
  ThoughtAttentionBackward<E> a;
  give_inputs(problem, a);
  auto& t = problem.tensors;
  t["out"].give(a.out);
  t["lse"].give(a.lse);
  t["d_out"].give(a.d_out);
  t["d_query"].give(a.d_query);
  t["d_text_key"].give(a.d_text_key);
  t["d_text_value"].give(a.d_text_value);
  t["d_path_key"].give(a.d_path_key);
  t["d_path_value"].give(a.d_path_value);
  const auto [B, H, T, Q, D] = a.query.shape;
  std::vector<float> workspace(
      thought_attention_backward_workspace(B, H, T, Q, a.text_key.shape[1], a.text_key.shape[2], a.path_key.shape[3]),
      NAN);
  return thought_attention_backward_cuda(a, workspace.data(), nullptr);
}

template <class E>
int run(Problem& problem) {
  ThoughtAttention<E> a;
  give_inputs(problem, a);
  problem.tensors["out"].give(a.out);
  if (problem.tensors.count("lse")) problem.tensors["lse"].give(a.lse);
  const int error = thought_attention_forward_cuda(a, nullptr);
  return error || !problem.backward ? error : run_backward<E>(problem);
}

int run_in_order(Problem& problem, unsigned seed) {
  shim::seed = seed;
  return problem.element == 0   ? run<float>(problem)
         : problem.element == 1 ? run<BFloat16>(problem)
                                : run<Float16>(problem);
}

}  // namespace

int main(int, char** arguments) {
  Problem problem = read_problem(arguments[1]), shuffled = problem;
  if (run_in_order(problem, 0) != 0 || run_in_order(shuffled, 1) != 0) shim::fail("a launch failed");
  std::ofstream to(arguments[2], std::ios::binary);
  for (auto& [name, tensor] : problem.tensors) {
    if (tensor.storage != shuffled.tensors[name].storage) shim::fail("the order of the threads shows in the result");
    if (name != "out" && name != "lse" && (name.rfind("d_", 0) != 0 || name == "d_out")) continue;
    to.write(tensor.storage.data(), tensor.storage.size());
  }
  return to.good() ? 0 : 1;
}
