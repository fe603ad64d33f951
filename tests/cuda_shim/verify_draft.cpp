// Runs the CUDA kernels of draft verification on one problem, on the CPU, in two orders of the threads that must give
// the same bits:
//   verify_draft <problem> <result>
// Both files hold tensors as `read_tensors` reads them; the result those that were written.
#include <fstream>
#include <map>
#include <string>

#include "../../csrc/draft_verification/cuda.cu"

namespace {

using namespace pyquiet;

struct Tensor {
  std::vector<int64_t> shape, stride;
  int64_t offset = 0;
  std::vector<char> storage;  // exactly as large as in Python, so that AddressSanitizer sees an overrun

  template <class T>
  T* data() {
    return reinterpret_cast<T*>(storage.data()) + offset;
  }
};

struct Tensors : std::map<std::string, Tensor> {
  template <class T, int N>
  void give(const char* name, View<T, N>& view) {
    if (!count(name)) return;
    Tensor& tensor = at(name);
    if (tensor.shape.size() != N) shim::fail("a tensor has another number of dimensions than the contract says");
    view.data = tensor.data<T>();
    std::copy(tensor.shape.begin(), tensor.shape.end(), view.shape.begin());
    std::copy(tensor.stride.begin(), tensor.stride.end(), view.stride.begin());
  }
};

template <class T>
T read(std::istream& from) {
  T value;
  from.read(reinterpret_cast<char*>(&value), sizeof value);
  return value;
}

Tensors read_tensors(const char* path) {
  std::ifstream from(path, std::ios::binary);
  from.exceptions(std::ios::failbit | std::ios::badbit);
  Tensors tensors;
  for (int64_t n = read<int64_t>(from); n > 0; --n) {
    std::string name(read<int64_t>(from), ' ');
    from.read(name.data(), name.size());
    Tensor& tensor = tensors[name];
    tensor.shape.resize(read<int64_t>(from));
    tensor.stride.resize(tensor.shape.size());
    for (auto* sizes : {&tensor.shape, &tensor.stride})
      for (int64_t& size : *sizes) size = read<int64_t>(from);
    tensor.offset = read<int64_t>(from);
    tensor.storage.resize(read<int64_t>(from));
    from.read(tensor.storage.data(), tensor.storage.size());
  }
  return tensors;
}

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
  a.stream.seed = static_cast<uint64_t>(options[1]);
  CounterField* fields[] = {&a.stream.sequence, &a.stream.position, &a.stream.step, &a.stream.index};
  const char* names[] = {"stream_sequence", "stream_position", "stream_step", "stream_index"};
  for (int i = 0; i < 4; ++i)
    *fields[i] = {t.count(names[i]) ? t.at(names[i]).data<int64_t>() : nullptr, options[2 + i]};
  const bool* banned = t.count("banned") ? t.at("banned").data<bool>() : nullptr;
  a.processing = {banned, static_cast<float>(reals[0]), options[6], reals[2]};
  a.draft_inverse = static_cast<float>(reals[1]);
  a.first_is_exact = options[7] != 0;
  a.gumbel = options[8] != 0;
  a.deterministic = options[9] != 0;
  const auto [B, rows, V] = a.target.shape;
  std::vector<float> workspace(verify_draft_workspace(B, a.draft_tokens.shape[1], rows, V), NAN);
  return verify_draft_cuda(a, workspace.data(), nullptr);
}

int run_in_order(Tensors& tensors, unsigned seed) {
  shim::seed = seed;
  const int64_t element = tensors.at("options").data<int64_t>()[0];
  return element == 0 ? run<float>(tensors) : element == 1 ? run<BFloat16>(tensors) : run<Float16>(tensors);
}

}  // namespace

int main(int, char** arguments) {
  Tensors tensors = read_tensors(arguments[1]), shuffled = tensors;
  if (run_in_order(tensors, 0) != 0 || run_in_order(shuffled, 1) != 0) shim::fail("a launch failed");
  std::ofstream to(arguments[2], std::ios::binary);
  for (auto& [name, tensor] : tensors)
    if (tensor.storage != shuffled[name].storage) shim::fail("the order of the threads shows in the result");
  for (const char* name : {"tokens", "count", "accepted", "log_probs", "bonus", "fault"})
    to.write(tensors[name].storage.data(), tensors[name].storage.size());
  return to.good() ? 0 : 1;
}
