// Ceilings of this machine: fp32 multiply-adds a second, bytes read a second, bf16 multiply-adds a second.
//
//   fma_peak THREADS MEGABYTES   prints   GFLOP/s  GB/s  and the GFLOP/s of bf16, where the ISA multiplies it: AMX
//   tiles, else vdpbf16ps
//
// VECTOR_BYTES (64, 32 or 16) is the register width of the ISA that is compiled for; an ISA without
// fused multiply-add is measured with a multiply and an add. 12 accumulators cover two units of
// latency 4 to 6 and still leave room for both operands among 16 registers.

#include <omp.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <vector>

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif
#ifdef __AMX_BF16__
#include <sys/syscall.h>
#include <unistd.h>
#endif

typedef float Vector __attribute__((vector_size(VECTOR_BYTES)));
constexpr int lanes = VECTOR_BYTES / sizeof(float);
constexpr int accumulators = 12;

static volatile float factor_source = 0.999f, addend_source = 0.001f, sink;

static void spin(long steps) {
  Vector factor = Vector{} + factor_source, addend = Vector{} + addend_source;
  Vector sum[accumulators];
  for (int a = 0; a < accumulators; ++a) sum[a] = addend * float(a);  // unequal: none folds away
  for (long step = 0; step < steps; ++step) {
#pragma GCC unroll 12
    for (int a = 0; a < accumulators; ++a) sum[a] = sum[a] * factor + addend;
  }
  float total = 0;
  for (const Vector& one : sum) total += one[0];
  sink = total;
}

#ifdef __AMX_BF16__
constexpr int tile_sums = 4, bf16_products = 16 * 16 * 32 * tile_sums / (accumulators * lanes);
static_assert(bf16_products * accumulators * lanes <= 16 * 16 * 32 * tile_sums, "never more than is done");

// Four sums of 16 x 16 over 32 products, all of ones.
static void spin_bf16(long steps) {
  alignas(64) static const unsigned char config[64] = {
      1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 64, 0,  64, 0,  64, 0,  64, 0, 64, 0, 64, 0, 0, 0, 0, 0,
      0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 16, 16, 16, 16, 16, 16, 0,  0, 0,  0, 0,  0, 0, 0, 0, 0};
  alignas(64) static const std::vector<unsigned short> ones(512, 0x3f80);
  float out[256];
  _tile_loadconfig(config);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  _tile_loadd(4, ones.data(), 64);
  _tile_loadd(5, ones.data(), 64);
  for (long step = 0; step < steps; ++step) {
    _tile_dpbf16ps(0, 4, 5);
    _tile_dpbf16ps(1, 4, 5);
    _tile_dpbf16ps(2, 4, 5);
    _tile_dpbf16ps(3, 4, 5);
  }
  _tile_stored(0, out, 64);
  _tile_release();
  sink = out[0];
}
#elif defined(__AVX512BF16__)
constexpr int bf16_products = 2;

static void spin_bf16(long steps) {
  const __m512 factor = _mm512_set1_ps(factor_source), addend = _mm512_set1_ps(addend_source);
  const __m512bh a = _mm512_cvtne2ps_pbh(factor, factor), b = _mm512_cvtne2ps_pbh(addend, factor);
  __m512 sum[accumulators];
  for (int k = 0; k < accumulators; ++k) sum[k] = _mm512_set1_ps(float(k));
  for (long step = 0; step < steps; ++step) {
#pragma GCC unroll 12
    for (int k = 0; k < accumulators; ++k) sum[k] = _mm512_dpbf16_ps(sum[k], a, b);
  }
  float total = 0;
  for (const __m512& one : sum) total += _mm512_cvtss_f32(one);
  sink = total;
}
#endif

// GFLOP/s of `spin`, each step of which makes `products` multiply-adds a lane and accumulator.
static double gflops(void (*spin)(long), int products, int threads) {
  constexpr long steps = 400000;
  double best = 1e30;
  for (int trial = 0; trial < 40; ++trial) {
    double begin = omp_get_wtime();
#pragma omp parallel num_threads(threads)
    spin(steps);
    best = std::min(best, omp_get_wtime() - begin);
  }
  return 2.0 * products * threads * steps * accumulators * lanes / best * 1e-9;
}

static double read_gbs(int threads, size_t megabytes) {
  const size_t vectors = (megabytes << 20) / sizeof(Vector);
  std::vector<Vector> data(vectors, Vector{} + 1.0f);
  double best = 1e30;
  for (int trial = 0; trial < 10; ++trial) {
    double begin = omp_get_wtime();
    float total = 0;
#pragma omp parallel num_threads(threads) reduction(+ : total)
    {
      Vector sum[4] = {};
#pragma omp for schedule(static)
      for (size_t i = 0; i < vectors / 4; ++i)
        for (int k = 0; k < 4; ++k) sum[k] += data[4 * i + k];
      total += (sum[0] + sum[1] + sum[2] + sum[3])[0];
    }
    sink = total;
    best = std::min(best, omp_get_wtime() - begin);
  }
  return vectors * sizeof(Vector) / best * 1e-9;
}

int main(int argc, char** argv) {
  if (argc != 3) return 2;
  const int threads = std::atoi(argv[1]);
  const double fp32 = gflops(spin, 1, threads);
  std::printf("%.1f %.1f", fp32, read_gbs(threads, std::atol(argv[2])));
#ifdef __AVX512BF16__
#ifdef __AMX_BF16__
  constexpr long request_permission = 0x1023, tile_data = 18;
  if (syscall(SYS_arch_prctl, request_permission, tile_data) != 0) return 1;
#endif
  std::printf(" %.1f", gflops(spin_bf16, bf16_products, threads));
#endif
  std::printf("\n");
}
