// The stream and the processing of a problem that draws, as tests/cuda_shim/driver.py writes them.
#pragma once

#include "../../csrc/common/law.hpp"
#include "tensors.hpp"

namespace {

// `words`: the fields' values where there is no tensor.
pyquiet::Stream stream_of(Tensors& t, int64_t seed, int64_t purpose, const int64_t* words) {
  pyquiet::Stream stream{static_cast<uint64_t>(seed), static_cast<uint32_t>(purpose), {}, {}, {}, {}};
  pyquiet::CounterField* fields[] = {&stream.sequence, &stream.position, &stream.step, &stream.index};
  const char* names[] = {"stream_sequence", "stream_position", "stream_step", "stream_index"};
  for (int i = 0; i < 4; ++i) *fields[i] = {t.count(names[i]) ? t.at(names[i]).data<int64_t>() : nullptr, words[i]};
  return stream;
}

pyquiet::Processing processing_of(Tensors& t, double inverse, int64_t top_k, double top_p) {
  return {t.count("banned") ? t.at("banned").data<bool>() : nullptr, static_cast<float>(inverse), top_k, top_p};
}

}  // namespace
