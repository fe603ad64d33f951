// Runs the CUDA kernels of thought attention on one problem, on the CPU, in two orders of the threads that must give
// the same bits:
//   thought_attention <problem> <result>
// The problem is what read_tensors reads; the result the storages of the tensors that were written, by name.
#include <string>

#include "../../csrc/thought_attention/cuda.cu"
#include "tensors.hpp"

namespace {

using namespace pyquiet;

template <class E>
void give_inputs(Tensors& t, ThoughtInputs<E>& a) {
  t.give("query", a.query);
  t.give("text_key", a.text_key);
  t.give("text_value", a.text_value);
  t.give("path_key", a.path_key);
  t.give("path_value", a.path_value);
  t.give("text_limits", a.text_limits);
  t.give("text_start", a.text_start);
  const double* reals = t.at("reals").data<double>();
  a.scale = static_cast<float>(reals[0]);
  a.softcap = static_cast<float>(reals[1]);
  a.window = t.at("options").data<int64_t>()[1];
}

template <class E>
int run_backward(Tensors& t) {
  ThoughtAttentionBackward<E> a;
  give_inputs(t, a);
  t.give("out", a.out);
  t.give("lse", a.lse);
  t.give("d_out", a.d_out);
  t.give("d_query", a.d_query);
  t.give("d_text_key", a.d_text_key);
  t.give("d_text_value", a.d_text_value);
  t.give("d_path_key", a.d_path_key);
  t.give("d_path_value", a.d_path_value);
  const auto [B, H, T, Q, D] = a.query.shape;
  std::vector<float> workspace(
      thought_attention_backward_workspace(B, H, T, Q, a.text_key.shape[1], a.text_key.shape[2], a.path_key.shape[3]),
      NAN);
  return thought_attention_backward_cuda(a, workspace.data(), nullptr);
}

template <class E>
int run(Tensors& t) {
  ThoughtAttention<E> a;
  give_inputs(t, a);
  t.give("out", a.out);
  t.give("lse", a.lse);
  const int error = thought_attention_forward_cuda(a, nullptr);
  return error || !t.count("d_out") ? error : run_backward<E>(t);
}

}  // namespace

int main(int, char** arguments) {
  const auto run_as_told = [](Tensors& tensors) {
    const int64_t element = tensors.at("options").data<int64_t>()[0];
    return element == 0 ? run<float>(tensors) : element == 1 ? run<BFloat16>(tensors) : run<Float16>(tensors);
  };
  return run_in_two_orders(arguments, run_as_told, [](const std::string& name) {
    return name == "out" || name == "lse" || (name.rfind("d_", 0) == 0 && name != "d_out");
  });
}
