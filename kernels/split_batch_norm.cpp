// Split batch norm with batch statistics on a CPU: forward and backward, each in one parallel region.
//
// A channels-last tensor is read as (branches, rows, channels), rows contiguous. Bytes: forward reads x twice and
// writes y once, ReLU and residual included; backward reads dy and x twice and writes dx once, and with a residual
// reads y once more and writes its gradient. Rows are taken in chunks that stay in a core's cache. What a chunk
// yields does not depend on the number of threads, nor does the order in which chunks are combined.
//
// Float for statistics, double where chunks are combined. T is float or bfloat16 (its bits).

#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

#if defined(__AVX512F__)
constexpr int BYTES = 64;
#elif defined(__AVX2__)
constexpr int BYTES = 32;
#else
constexpr int BYTES = 16;
#endif
constexpr int LANES = BYTES / 4;
constexpr int UNROLLED = 4;             // vectors of channels whose sums stay in registers
constexpr int64_t CHUNK = 16384;        // elements
constexpr int64_t MOST_ROWS = 512;      // of a chunk
constexpr int64_t RUN = 16;             // rows summed up before they join a chunk's sum: keeps its rounding small
constexpr int64_t PER_THREAD = 32768;   // elements, at least: PyTorch's grain
constexpr int64_t HEAD = 8;             // rows whose mean a chunk is shifted by

using bf16 = uint16_t;
typedef float Vector __attribute__((vector_size(BYTES)));
typedef int32_t Mask __attribute__((vector_size(BYTES)));
typedef uint32_t Bits __attribute__((vector_size(BYTES)));
typedef bf16 Halves __attribute__((vector_size(BYTES / 2)));

template <class T> struct Stored { using type = Vector; };
template <> struct Stored<bf16> { using type = Halves; };

inline Vector widen(Vector v) { return v; }
inline Vector widen(Halves h) { return (Vector)(__builtin_convertvector(h, Bits) << 16); }

template <class T> typename Stored<T>::type narrow(Vector v);
template <> inline Vector narrow<float>(Vector v) { return v; }
template <> inline Halves narrow<bf16>(Vector v) {
  // To nearest, ties to even; NaN stays NaN.
  const Bits bits = (Bits)v;
  const Bits rounded = (bits + (0x7fff + ((bits >> 16) & 1))) >> 16;
  const Bits quiet = rounded * 0 + 0x7fc0;
  return __builtin_convertvector((Bits)(v == v ? rounded : quiet), Halves);
}

// A vector of `lanes` channels; PART: fewer than LANES, the others read as zero and stay unwritten.
template <class T, bool PART> inline Vector load(const T *p, int lanes) {
  typename Stored<T>::type v{};
  memcpy(&v, p, PART ? lanes * sizeof(T) : sizeof v);
  return widen(v);
}
template <class T, bool PART> inline void store(T *p, int lanes, Vector value) {
  const auto v = narrow<T>(value);
  memcpy(p, &v, PART ? lanes * sizeof(T) : sizeof v);
}

inline Vector rectified(Vector z) { return z <= 0 ? Vector{} : z; }  // NaN passes, as in PyTorch

// Calls tile(c, lanes) for every tile of channels: `f.template tile<vectors, part>(c, lanes)`.
template <class F> inline void over_channels(int64_t channels, F &f) {
  int64_t c = 0;
  for (; c + UNROLLED * LANES <= channels; c += UNROLLED * LANES) f.template tile<UNROLLED, false>(c, LANES);
  for (; c + LANES <= channels; c += LANES) f.template tile<1, false>(c, LANES);
  if (c < channels) f.template tile<1, true>(c, int(channels - c));
}

inline int64_t run_end(int64_t row, int64_t rows) { return row + RUN < rows ? row + RUN : rows; }

struct Shape {
  int64_t branches, rows, channels;
  int64_t per_chunk() const {
    const int64_t n = CHUNK / channels;
    return n < 1 ? 1 : n > MOST_ROWS ? MOST_ROWS : n;
  }
  int64_t chunks() const { return (rows + per_chunk() - 1) / per_chunk(); }  // of a branch
  int64_t all() const { return branches * chunks(); }
  int64_t length(int64_t k) const {  // rows of the k-th chunk of all
    const int64_t before = k % chunks() * per_chunk();
    return rows - before < per_chunk() ? rows - before : per_chunk();
  }
  int64_t branch(int64_t k) const { return k / chunks(); }
  int64_t offset(int64_t k) const { return (branch(k) * rows + k % chunks() * per_chunk()) * channels; }
  // As many as have enough to do, and a chunk each: what waits for another costs more than a small layer.
  int threads(int most) const {
    const int64_t busy = branches * rows * channels / PER_THREAD, useful = busy < all() ? busy : all();
    return useful < 1 ? 1 : useful < most ? int(useful) : most;
  }
};

// ---- forward ----

// Mean and sum of squared deviations of a chunk, in one pass over x. Shifted by the mean of 8 of its n rows, which
// is at most sqrt(n / 8) standard deviations from its own mean: the variance keeps all but log2(n / 8) bits.
template <class T> struct ChunkStatistics {
  const T *x;
  int64_t rows, channels;
  float *mean, *m2;
  template <int K, bool PART> void tile(int64_t c, int lanes) {
    Vector shift[K] = {}, sum[K] = {}, squares[K] = {};
    const int64_t head = rows < HEAD ? rows : HEAD;
    for (int64_t r = 0; r < head; r++)
      for (int k = 0; k < K; k++) shift[k] += load<T, PART>(x + r * channels + c + k * LANES, lanes);
    for (int k = 0; k < K; k++) shift[k] /= float(head);
    for (int64_t r = 0; r < rows;) {
      Vector run[K] = {}, run_squares[K] = {};
      for (const int64_t end = run_end(r, rows); r < end; r++)
        for (int k = 0; k < K; k++) {
          const Vector d = load<T, PART>(x + r * channels + c + k * LANES, lanes) - shift[k];
          run[k] += d;
          run_squares[k] += d * d;
        }
      for (int k = 0; k < K; k++) {
        sum[k] += run[k];
        squares[k] += run_squares[k];
      }
    }
    for (int k = 0; k < K; k++) {
      const Vector m = sum[k] / float(rows), q = squares[k] - sum[k] * m;
      store<float, PART>(mean + c + k * LANES, lanes, shift[k] + m);
      store<float, PART>(m2 + c + k * LANES, lanes, q < 0 ? Vector{} : q);
    }
  }
};

template <class T, bool RESIDUAL, bool RELU> struct Apply {
  const T *x, *residual;
  T *y;
  int64_t rows, channels;
  const float *mean, *scale, *bias;
  template <int K, bool PART> void tile(int64_t c, int lanes) {
    Vector m[K], s[K], b[K];
    for (int k = 0; k < K; k++) {
      m[k] = load<float, PART>(mean + c + k * LANES, lanes);
      s[k] = load<float, PART>(scale + c + k * LANES, lanes);
      b[k] = load<float, PART>(bias + c + k * LANES, lanes);
    }
    for (int64_t r = 0; r < rows; r++)
      for (int k = 0; k < K; k++) {
        const int64_t i = r * channels + c + k * LANES;
        Vector z = (load<T, PART>(x + i, lanes) - m[k]) * s[k] + b[k];
        if (RESIDUAL) z += load<T, PART>(residual + i, lanes);
        store<T, PART>(y + i, lanes, RELU ? rectified(z) : z);
      }
  }
};

// partial: (all chunks, 2, channels). Chan's combination; `scale` is weight / sqrt(var + eps).
void combine_statistics(const Shape &s, int64_t q, const float *partial, const float *weight, float eps, float *mean,
                        float *var, float *scale) {
  const int64_t b = q / s.channels, c = q % s.channels, n = s.chunks();
  const float *p = partial + 2 * b * n * s.channels + c;
  double total = 0, m2 = 0;
  for (int64_t j = 0; j < n; j++) total += double(s.length(j)) * p[2 * j * s.channels];
  const double m = total / double(s.rows);
  for (int64_t j = 0; j < n; j++) {
    const double d = p[2 * j * s.channels] - m;
    m2 += p[(2 * j + 1) * s.channels] + double(s.length(j)) * d * d;
  }
  mean[q] = float(m);
  var[q] = float(m2 / double(s.rows));
  scale[q] = weight[q] / std::sqrt(var[q] + eps);
}

template <class T, bool RESIDUAL, bool RELU>
void forward(const Shape &s, const T *x, const T *residual, T *y, const float *weight, const float *bias, float *mean,
             float *var, float eps, float *scratch, int threads) {
  float *partial = scratch, *scale = scratch + 2 * s.all() * s.channels;
#pragma omp parallel num_threads(s.threads(threads))
  {
#pragma omp for schedule(static)
    for (int64_t k = 0; k < s.all(); k++) {
      float *p = partial + 2 * k * s.channels;
      ChunkStatistics<T> chunk{x + s.offset(k), s.length(k), s.channels, p, p + s.channels};
      over_channels(s.channels, chunk);
    }
#pragma omp for schedule(static)
    for (int64_t q = 0; q < s.branches * s.channels; q++)
      combine_statistics(s, q, partial, weight, eps, mean, var, scale);
#pragma omp for schedule(static)
    for (int64_t k = 0; k < s.all(); k++) {
      const int64_t i = s.offset(k), b = s.branch(k) * s.channels;
      Apply<T, RESIDUAL, RELU> chunk{x + i, RESIDUAL ? residual + i : nullptr, y + i, s.length(k), s.channels,
                                     mean + b, scale + b, bias + b};
      over_channels(s.channels, chunk);
    }
  }
}

// ---- backward ----

enum Gate { OPEN, FROM_X, FROM_Y };  // no ReLU; its sign found again from x; closed where y <= 0

// The gradient before the ReLU: dy [+ second, rounded as an addition would], zero where the gate is closed.
template <class T, Gate GATE, bool JOIN> struct Incoming {
  const T *dy, *second, *x, *y;
  template <bool PART> Vector at(int64_t i, int lanes, Vector d, Vector scale, Vector bias) const {
    Vector g = load<T, PART>(dy + i, lanes);
    if (JOIN) g = widen(narrow<T>(g + load<T, PART>(second + i, lanes)));
    if (GATE == FROM_X) g = d * scale + bias <= 0 ? Vector{} : g;
    if (GATE == FROM_Y) g = load<T, PART>(y + i, lanes) <= 0 ? Vector{} : g;
    return g;
  }
};

template <class T, Gate GATE, bool JOIN, bool KEEP> struct ChunkSums {
  Incoming<T, GATE, JOIN> in;
  const T *x;
  T *kept;
  int64_t rows, channels;
  const float *mean, *scale, *bias;
  float *sum_g, *sum_gd;
  template <int K, bool PART> void tile(int64_t c, int lanes) {
    Vector m[K], s[K], b[K], g_sum[K] = {}, gd_sum[K] = {};
    for (int k = 0; k < K; k++) {
      m[k] = load<float, PART>(mean + c + k * LANES, lanes);
      s[k] = load<float, PART>(scale + c + k * LANES, lanes);
      b[k] = load<float, PART>(bias + c + k * LANES, lanes);
    }
    for (int64_t r = 0; r < rows;) {
      Vector g_run[K] = {}, gd_run[K] = {};
      for (const int64_t end = run_end(r, rows); r < end; r++)
        for (int k = 0; k < K; k++) {
          const int64_t i = r * channels + c + k * LANES;
          const Vector d = load<T, PART>(x + i, lanes) - m[k];
          const Vector g = in.template at<PART>(i, lanes, d, s[k], b[k]);
          if (KEEP) store<T, PART>(kept + i, lanes, g);
          g_run[k] += g;
          gd_run[k] += g * d;
        }
      for (int k = 0; k < K; k++) {
        g_sum[k] += g_run[k];
        gd_sum[k] += gd_run[k];
      }
    }
    for (int k = 0; k < K; k++) {
      store<float, PART>(sum_g + c + k * LANES, lanes, g_sum[k]);
      store<float, PART>(sum_gd + c + k * LANES, lanes, gd_sum[k]);
    }
  }
};

// dx = scale·g + slope·(x − mean) + shift
template <class T, Gate GATE, bool JOIN> struct InputGradient {
  Incoming<T, GATE, JOIN> in;
  const T *x;
  T *dx;
  int64_t rows, channels;
  const float *mean, *scale, *bias, *slope, *shift;
  template <int K, bool PART> void tile(int64_t c, int lanes) {
    Vector m[K], s[K], b[K], a[K], o[K];
    for (int k = 0; k < K; k++) {
      m[k] = load<float, PART>(mean + c + k * LANES, lanes);
      s[k] = load<float, PART>(scale + c + k * LANES, lanes);
      b[k] = load<float, PART>(bias + c + k * LANES, lanes);
      a[k] = load<float, PART>(slope + c + k * LANES, lanes);
      o[k] = load<float, PART>(shift + c + k * LANES, lanes);
    }
    for (int64_t r = 0; r < rows; r++)
      for (int k = 0; k < K; k++) {
        const int64_t i = r * channels + c + k * LANES;
        const Vector d = load<T, PART>(x + i, lanes) - m[k];
        const Vector g = in.template at<PART>(i, lanes, d, s[k], b[k]);
        store<T, PART>(dx + i, lanes, s[k] * g + (a[k] * d + o[k]));
      }
  }
};

// The whole sums of a channel, and what the input gradient makes of them.
void combine_sums(const Shape &s, int64_t q, const float *partial, const float *scale, const float *var, float eps,
                  float *dweight, float *dbias, float *slope, float *shift) {
  const int64_t b = q / s.channels, c = q % s.channels, n = s.chunks();
  const float *p = partial + 2 * b * n * s.channels + c;
  double g = 0, gd = 0;
  for (int64_t j = 0; j < n; j++) {
    g += p[2 * j * s.channels];
    gd += p[(2 * j + 1) * s.channels];
  }
  const double rstd = 1 / std::sqrt(double(var[q]) + eps), rows = double(s.rows);
  dbias[q] = float(g);
  dweight[q] = float(gd * rstd);
  slope[q] = float(-scale[q] * gd * rstd * rstd / rows);
  shift[q] = float(-scale[q] * g / rows);
}

template <class T> struct BackwardArguments {
  const T *dy, *second, *x, *y;
  T *dx, *kept;
  const float *weight, *bias, *mean, *var;
  float *dweight, *dbias;
  float eps;
  float *scratch;
  int threads;
};

template <class T, Gate GATE, bool JOIN>
Incoming<T, GATE, JOIN> incoming(const BackwardArguments<T> &t, int64_t i) {
  return {t.dy + i, JOIN ? t.second + i : nullptr, t.x + i, GATE == FROM_Y ? t.y + i : nullptr};
}

template <class T, Gate GATE, bool JOIN, bool KEEP> void backward(const Shape &s, const BackwardArguments<T> &t) {
  const int64_t values = s.branches * s.channels;
  float *partial = t.scratch, *scale = partial + 2 * s.all() * s.channels, *slope = scale + values,
        *shift = slope + values;
  // What has been kept is read again, through an open gate.
  constexpr Gate AGAIN = KEEP ? OPEN : GATE;
  constexpr bool JOIN_AGAIN = !KEEP && JOIN;
  BackwardArguments<T> again = t;
  if (KEEP) again.dy = t.kept;
#pragma omp parallel num_threads(s.threads(t.threads))
  {
#pragma omp for schedule(static)
    for (int64_t q = 0; q < values; q++) scale[q] = t.weight[q] / std::sqrt(t.var[q] + t.eps);
#pragma omp for schedule(static)
    for (int64_t k = 0; k < s.all(); k++) {
      const int64_t i = s.offset(k), b = s.branch(k) * s.channels;
      float *p = partial + 2 * k * s.channels;
      ChunkSums<T, GATE, JOIN, KEEP> chunk{incoming<T, GATE, JOIN>(t, i), t.x + i, KEEP ? t.kept + i : nullptr,
                                           s.length(k), s.channels, t.mean + b, scale + b, t.bias + b, p,
                                           p + s.channels};
      over_channels(s.channels, chunk);
    }
#pragma omp for schedule(static)
    for (int64_t q = 0; q < values; q++)
      combine_sums(s, q, partial, scale, t.var, t.eps, t.dweight, t.dbias, slope, shift);
#pragma omp for schedule(static)
    for (int64_t k = 0; k < s.all(); k++) {
      const int64_t i = s.offset(k), b = s.branch(k) * s.channels;
      InputGradient<T, AGAIN, JOIN_AGAIN> chunk{incoming<T, AGAIN, JOIN_AGAIN>(again, i), t.x + i, t.dx + i,
                                                s.length(k), s.channels, t.mean + b, scale + b, t.bias + b,
                                                slope + b, shift + b};
      over_channels(s.channels, chunk);
    }
  }
}

template <class T, Gate GATE> void backward_of(const Shape &s, const BackwardArguments<T> &t) {
  if (t.second)
    t.kept ? backward<T, GATE, true, true>(s, t) : backward<T, GATE, true, false>(s, t);
  else
    t.kept ? backward<T, GATE, false, true>(s, t) : backward<T, GATE, false, false>(s, t);
}

template <class T>
void any_forward(const Shape &s, const void *x, const void *residual, void *y, const float *weight, const float *bias,
                 float *mean, float *var, int relu, float eps, float *scratch, int threads) {
  const auto run = residual ? (relu ? forward<T, true, true> : forward<T, true, false>)
                            : (relu ? forward<T, false, true> : forward<T, false, false>);
  run(s, (const T *)x, (const T *)residual, (T *)y, weight, bias, mean, var, eps, scratch, threads);
}

template <class T>
void any_backward(const Shape &s, const void *dy, const void *second, const void *x, const void *y, void *dx,
                  void *kept, const float *weight, const float *bias, const float *mean, const float *var,
                  float *dweight, float *dbias, int relu, float eps, float *scratch, int threads) {
  const BackwardArguments<T> t{(const T *)dy, (const T *)second, (const T *)x, (const T *)y, (T *)dx, (T *)kept,
                               weight, bias, mean, var, dweight, dbias, eps, scratch, threads};
  if (!relu)
    backward_of<T, OPEN>(s, t);
  else if (y)
    backward_of<T, FROM_Y>(s, t);
  else
    backward_of<T, FROM_X>(s, t);
}

}  // namespace

extern "C" {

int64_t scratch_floats(int64_t branches, int64_t rows, int64_t channels) {
  const Shape s{branches, rows, channels};
  return 2 * s.all() * channels + 3 * branches * channels;
}

void split_bn_forward(int half, int64_t branches, int64_t rows, int64_t channels, const void *x, const void *residual,
                      void *y, const float *weight, const float *bias, float *mean, float *var, int relu, float eps,
                      float *scratch, int threads) {
  (half ? any_forward<bf16> : any_forward<float>)(Shape{branches, rows, channels}, x, residual, y, weight, bias, mean,
                                                  var, relu, eps, scratch, threads);
}

void split_bn_backward(int half, int64_t branches, int64_t rows, int64_t channels, const void *dy, const void *second,
                       const void *x, const void *y, void *dx, void *kept, const float *weight, const float *bias,
                       const float *mean, const float *var, float *dweight, float *dbias, int relu, float eps,
                       float *scratch, int threads) {
  (half ? any_backward<bf16> : any_backward<float>)(Shape{branches, rows, channels}, dy, second, x, y, dx, kept,
                                                    weight, bias, mean, var, dweight, dbias, relu, eps, scratch,
                                                    threads);
}
}
