// Thought attention on CUDA: the launches. One source for sm_80 and later; bf16 and fp16 multiply on the tensor cores
// (mma.m16n8k16, sums in float), float by plain FMAs in the same registers, since TF32 would keep three digits.
//
// The rows of one (b, g), which are its positions, heads of the group and steps, steps fastest, are cut into tiles of
// kM. They share one range of the text, so that each key is read once for all of them. A block owns a tile; its keys
// stream past in blocks of kN, first the own paths of its positions, a block-diagonal mask, then the range of the text
// that any of its rows sees; a warp leaves out every 16 keys that none of its rows sees. Every mask is an interval of
// keys for each row. One online softmax in base 2 runs over both, in registers. Copies are asynchronous and one block
// ahead, into two buffers: one barrier for each block of keys.
//
// Traffic of the forward: query, path keys and values once, out once; the text once for each kM rows, mostly from the
// cache. The backward (cuda_backward.cuh) reads them three times: once for out . d_out, once for each owner of
// gradients.
//
// Tiles are as large as the registers (no spills) and the 163 KB of shared memory of sm_80 allow; 128 query rows at
// D <= 128, where each warp takes 32, halve what the warp reads of keys and values for each product.
#include "cuda.hpp"
#include "cuda_backward.cuh"
#include "cuda_forward.cuh"

namespace pyquiet {
namespace {

template <class T, int N>
Array<T, N> array(const View<T, N>& view) {
  Array<T, N> result{view.data, {}};
  for (int i = 0; i < N; ++i) result.stride[i] = view.stride[i];
  return result;
}

Divisor divisor(int64_t by) {
  by = by > 0 ? by : 1;  // without heads nothing is divided
  uint32_t shift = 0;
  while (int64_t{1} << shift < by) ++shift;
  const uint64_t factor = ((uint64_t{1} << 32) * ((uint64_t{1} << shift) - by)) / by + 1;
  return {static_cast<uint32_t>(by), static_cast<uint32_t>(factor), shift};
}

// Whether every row of the last dimension starts at a multiple of 16 bytes.
template <class T, int N>
bool aligned(const View<T, N>& view) {
  bool all = reinterpret_cast<uintptr_t>(view.data) % 16 == 0;
  for (int i = 0; i < N - 1; ++i) all &= view.shape[i] <= 1 || view.stride[i] * sizeof(T) % 16 == 0;
  return all;
}

template <class E>
Inputs<E> inputs(const ThoughtInputs<E>& a) {
  Inputs<E> p{};
  p.query = array(a.query);
  p.text_key = array(a.text_key);
  p.text_value = array(a.text_value);
  p.path_key = array(a.path_key);
  p.path_value = array(a.path_value);
  p.text_limits = array(a.text_limits);
  p.text_start = array(a.text_start);
  const auto [B, H, T, Q, D] = a.query.shape;
  const int64_t G = a.text_key.shape[1], P = a.path_key.shape[3], group = H / G;
  p.heads = B * G;
  p.rows = T * group * Q;
  p.path_keys = T * P;
  p.G = static_cast<int32_t>(G);
  p.S = static_cast<int32_t>(a.text_key.shape[2]);
  p.group = static_cast<int32_t>(group);
  p.Q = static_cast<int32_t>(Q);
  p.P = static_cast<int32_t>(P);
  p.D = static_cast<int32_t>(D);
  p.by_step = divisor(Q);
  p.by_row = divisor(group * Q);
  p.by_path = divisor(P);
  p.window = a.window;
  p.factor = a.softcap > 0 ? a.scale / a.softcap : a.scale * kLog2E;
  p.cap = a.softcap > 0 ? a.softcap * kLog2E : 0.0f;
  p.vectors =
      aligned(a.query) && aligned(a.text_key) && aligned(a.text_value) && aligned(a.path_key) && aligned(a.path_value);
  return p;
}

constexpr int kMaxShared = 163 * 1024;  // of a block on sm_80
constexpr int kInvalidValue = 1;        // cudaErrorInvalidValue

// Rows of a position and keys of a path are counted in 32 bits within a tile.
template <class E>
bool countable(const ThoughtInputs<E>& a) {
  return a.query.shape[1] * a.query.shape[3] < 1 << 30 && a.path_key.shape[3] < 1 << 23;
}

template <class C>
int forward(Forward<typename C::E> f, void* stream) {
  static_assert(sizeof(ForwardShared<C>) <= kMaxShared, "the tiles are too large");
  f.tiles = (f.in.rows + C::kM - 1) / C::kM;
  return launch(forward_kernel<C>, f.in.heads * f.tiles, C::kThreads, sizeof(ForwardShared<C>), stream, f);
}

template <class Queries, class Keys, class E>
int backward(Backward<E> f, void* stream) {
  static_assert(sizeof(QueryGradientShared<Queries>) <= kMaxShared && sizeof(KeyGradientShared<Keys>) <= kMaxShared,
                "the tiles are too large");
  const Inputs<E>& p = f.in;
  f.tiles = (p.rows + Queries::kM - 1) / Queries::kM;
  f.own_stride = p.P < Keys::kM ? Keys::kM / p.P * p.P : Keys::kM;  // whole positions where they fit
  f.text_blocks = (p.S + Keys::kM - 1) / Keys::kM;
  f.own_blocks = (p.path_keys + f.own_stride - 1) / f.own_stride;
  const int64_t key_blocks = p.heads * (f.text_blocks + f.own_blocks) * (Keys::kD > 128 ? 2 : 1);
  int error =
      launch(prepare_kernel<E>, p.heads * f.range_tiles, kPrepareThreads, kRangeRows * sizeof(Interval), stream, f);
  if (error == 0)
    error = launch(query_gradient_kernel<Queries>, p.heads * f.tiles, Queries::kThreads,
                   sizeof(QueryGradientShared<Queries>), stream, f);
  if (error == 0)
    error = launch(key_gradient_kernel<Keys>, key_blocks, Keys::kThreads, sizeof(KeyGradientShared<Keys>), stream, f);
  return error;
}

int64_t range_tiles(int64_t rows) { return (rows + kRangeRows - 1) / kRangeRows; }

}  // namespace

template <class E>
int thought_attention_forward_cuda(const ThoughtAttention<E>& a, void* stream) {
  if (!countable(a)) return kInvalidValue;
  Forward<E> f{inputs(a), array(a.out), array(a.lse), 0};
  f.in.vectors = f.in.vectors && aligned(a.out);
  constexpr bool kHalf = sizeof(E) == 2;
  if (f.in.D <= 64) return forward<Shape<E, 64, 4, 2, kHalf ? 48 : 32, 3>>(f, stream);
  if (f.in.D <= 128) return forward<Shape<E, 128, 4, 2, kHalf ? 48 : 32, 2>>(f, stream);
  return forward<Shape<E, 256, 4, 1, kHalf ? 32 : 16, 2>>(f, stream);
}

int64_t thought_attention_backward_workspace(int64_t B, int64_t H, int64_t T, int64_t Q, int64_t G, int64_t, int64_t) {
  const int64_t bytes = B * H * T * Q * sizeof(RowState) + B * range_tiles(G ? T * (H / G) * Q : 0) * sizeof(Interval);
  return bytes / sizeof(float);
}

template <class E>
int thought_attention_backward_cuda(const ThoughtAttentionBackward<E>& a, float* workspace, void* stream) {
  if (!countable(a)) return kInvalidValue;
  Backward<E> f{};
  f.in = inputs(a);
  f.out = array(a.out);
  f.d_out = array(a.d_out);
  f.lse = array(a.lse);
  f.d_query = array(a.d_query);
  f.d_text_key = array(a.d_text_key);
  f.d_text_value = array(a.d_text_value);
  f.d_path_key = array(a.d_path_key);
  f.d_path_value = array(a.d_path_value);
  f.in.vectors = f.in.vectors && aligned(a.out) && aligned(a.d_out) && aligned(a.d_query) && aligned(a.d_text_key) &&
                 aligned(a.d_text_value) && aligned(a.d_path_key) && aligned(a.d_path_value);
  f.rows = reinterpret_cast<RowState*>(workspace);
  f.ranges = reinterpret_cast<Interval*>(f.rows + f.in.heads * f.in.rows);
  f.range_tiles = range_tiles(f.in.rows);
  f.scale = a.scale;
  constexpr bool kHalf = sizeof(E) == 2;
  constexpr int kN = kHalf ? 64 : 32;
  if (f.in.D <= 64) return backward<Shape<E, 64, 4, 1, kN, 3>, Shape<E, 64, 4, 1, kN, 2>>(f, stream);
  using Upto128 = Shape<E, 128, 4, 1, 32, 2>;
  if (f.in.D <= 128) return backward<Upto128, Upto128>(f, stream);
  using Upto256 = Shape<E, 256, kHalf ? 4 : 2, 1, kN / 2, 2>;
  return backward<Upto256, Upto256>(f, stream);
}

template int thought_attention_forward_cuda(const ThoughtAttention<float>&, void*);
template int thought_attention_forward_cuda(const ThoughtAttention<BFloat16>&, void*);
template int thought_attention_forward_cuda(const ThoughtAttention<Float16>&, void*);
template int thought_attention_backward_cuda(const ThoughtAttentionBackward<float>&, float*, void*);
template int thought_attention_backward_cuda(const ThoughtAttentionBackward<BFloat16>&, float*, void*);
template int thought_attention_backward_cuda(const ThoughtAttentionBackward<Float16>&, float*, void*);

}  // namespace pyquiet
