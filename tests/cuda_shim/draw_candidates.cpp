// Runs the CUDA kernels that draw candidates on one problem, on the CPU, in two orders of the threads that must give
// the same bits:
//   draw_candidates <problem> <result>
// The problem is what read_tensors reads; the result the storages of the tensors that were written, by name.
#include <set>
#include <string>

#include "../../csrc/importance_resampling/cuda.cu"
#include "streams.hpp"

namespace {

using namespace pyquiet;

template <class E>
int run(Tensors& t) {
  CandidateDraw<E> a{};
  t.give("logits", a.logits);
  t.give("tokens", a.tokens);
  t.give("log_probs", a.log_probs);
  t.give("log_base", a.log_base);
  t.give("lse", a.lse);
  t.give("fault", a.fault);
  const int64_t* options = t.at("options").data<int64_t>();
  const double* reals = t.at("reals").data<double>();
  a.stream = stream_of(t, options[1], options[6], options + 2);
  a.processing = processing_of(t, reals[0], options[7], reals[1]);
  a.deterministic = options[8] != 0;
  const auto [R, V] = a.logits.shape;
  std::vector<float> workspace(draw_candidates_workspace(R, V), NAN);
  return draw_candidates_cuda(a, workspace.data(), nullptr);
}

}  // namespace

int main(int, char** arguments) {
  const auto run_as_told = [](Tensors& tensors) {
    const int64_t element = tensors.at("options").data<int64_t>()[0];
    return element == 0 ? run<float>(tensors) : element == 1 ? run<BFloat16>(tensors) : run<Float16>(tensors);
  };
  const std::set<std::string> results{"tokens", "log_probs", "log_base", "lse", "fault"};
  return run_in_two_orders(arguments, run_as_told, [&](const std::string& name) { return results.count(name) > 0; });
}
