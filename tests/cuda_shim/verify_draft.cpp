// Runs the CUDA kernels of draft verification on one problem, on the CPU, in two orders of the threads that must give
// the same bits:
//   verify_draft <problem> <result>
// The problem is what read_tensors reads; the result the storages of the tensors that were written, by name.
#include <set>
#include <string>

#include "../../csrc/draft_verification/cuda.cu"
#include "streams.hpp"

namespace {

using namespace pyquiet;

template <class E>
int run(Tensors& t) {
  DraftVerification<E> a{};
  t.give("target_logits", a.target);
  t.give("draft_logits", a.draft);
  t.give("draft_tokens", a.draft_tokens);
  t.give("draft_lse", a.draft_lse);
  t.give("lengths", a.lengths);
  t.give("tokens", a.tokens);
  t.give("count", a.count);
  t.give("accepted", a.accepted);
  t.give("log_probs", a.log_probs);
  t.give("bonus", a.bonus);
  t.give("fault", a.fault);
  const int64_t* options = t.at("options").data<int64_t>();
  const double* reals = t.at("reals").data<double>();
  a.stream = stream_of(t, options[1], 0, options + 2);
  a.processing = processing_of(t, reals[0], options[6], reals[2]);
  a.draft_inverse = static_cast<float>(reals[1]);
  a.first_is_exact = options[7] != 0;
  a.gumbel = options[8] != 0;
  a.deterministic = options[9] != 0;
  const auto [B, rows, V] = a.target.shape;
  std::vector<float> workspace(verify_draft_workspace(B, a.draft_tokens.shape[1], rows, V), NAN);
  return verify_draft_cuda(a, workspace.data(), nullptr);
}

}  // namespace

int main(int, char** arguments) {
  const auto run_as_told = [](Tensors& tensors) {
    const int64_t element = tensors.at("options").data<int64_t>()[0];
    return element == 0 ? run<float>(tensors) : element == 1 ? run<BFloat16>(tensors) : run<Float16>(tensors);
  };
  const std::set<std::string> results{"tokens", "count", "accepted", "log_probs", "bonus", "fault"};
  return run_in_two_orders(arguments, run_as_told, [&](const std::string& name) { return results.count(name) > 0; });
}
