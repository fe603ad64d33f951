// The tensors of a problem as tests/cuda_shim/driver.py writes them: a number of them, and of each its name, shape,
// strides, offset and storage.
#pragma once

#include <fstream>
#include <map>
#include <string>
#include <vector>

namespace {

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
  // Leaves the view of a tensor that is not there as it is.
  template <class T, int N>
  void give(const char* name, pyquiet::View<T, N>& view) {
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

// Runs the problem in two orders of the threads and writes the storages of the tensors whose names `is_result` picks,
// in the order of the names; run(tensors) returns 0 where the launches went well.
template <class Run, class IsResult>
int run_in_two_orders(char** arguments, Run run, IsResult is_result) {
  Tensors tensors = read_tensors(arguments[1]), shuffled = tensors;
  for (const auto& [seed, problem] : {std::pair{0u, &tensors}, std::pair{1u, &shuffled}}) {
    shim::seed = seed;
    if (run(*problem) != 0) shim::fail("a launch failed");
  }
  std::ofstream to(arguments[2], std::ios::binary);
  for (auto& [name, tensor] : tensors) {
    if (tensor.storage != shuffled[name].storage) shim::fail("the order of the threads shows in the result");
    if (is_result(name)) to.write(tensor.storage.data(), tensor.storage.size());
  }
  return to.good() ? 0 : 1;
}

}  // namespace
