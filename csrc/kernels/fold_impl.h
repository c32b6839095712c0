// The fold, written once. fold_baseline.cpp, fold_avx2.cpp and fold_avx512.cpp include it, each
// compiled for its own instruction set, after defining
//
//   PYCOMM_FOLD_FUNCTION      the function of fold_dispatch.h that this inclusion defines
//   PYCOMM_FOLD_VECTOR_BYTES  the width of a register
//
// Everything else here has internal linkage and calls nothing that could be shared with the rest
// of the program (fold_dispatch.h says why), so no std:: function and no inline function of core/.
//
// It is written with the compiler's vector types: `a + b` on two of them is one instruction,
// whatever the register's width, on every architecture. Each lane does what a scalar would do, and
// what is less than a register goes through the same code in a padded copy, so an element's bits
// depend neither on its place in the buffer nor on the instruction set.

#include <cstddef>
#include <cstdint>

#include "kernels/fold_dispatch.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define PYCOMM_INLINE inline __attribute__((always_inline))

namespace pycomm::detail {
namespace {

constexpr std::size_t kVectorBytes = PYCOMM_FOLD_VECTOR_BYTES;

/// Registers folded side by side: enough independent chains to hide an addition's latency.
constexpr std::size_t kTileVectors = 4;
/// Two sources do with 128 bytes, four registers at most: what is prefetched at once then hardly
/// delays the loads behind it.
constexpr std::size_t kPairTileVectors = kVectorBytes > 32 ? 128 / kVectorBytes : kTileVectors;

/// Sources are prefetched this far ahead, never beyond their end: there the next rank's part
/// begins. Two sources that two cores have just written, folded into both (two cores of a Xeon of
/// 2023): float32 4 to 12 %, bfloat16 and AVX2 9 to 50 % faster from 64 KiB to 2 MiB; at 32 KiB and
/// 16 MiB no slower. Asking for ownership at once (prefetchw) took up to a quarter longer;
/// streaming stores took four times as long up to 4 MiB and 1.4 times at 64 MiB.
/// Of many streams the processor loses track: 16 bfloat16 sources of 4 MiB became 1.3 to 1.8 times
/// as fast. With 4 sources in a near cache it would cost a tenth; two sources of 2 KiB each
/// were folded no slower without, 4 KiB all-reduced by two ranks 8 % faster.
constexpr std::size_t kPairPrefetchBytes = 1536;
constexpr std::size_t kPrefetchBytes = 1024;
constexpr std::size_t kPrefetchSources = 8;
constexpr std::size_t kCacheLineBytes = 64;

template <typename T, std::size_t lanes>
using Vector __attribute__((vector_size(lanes * sizeof(T)))) = T;

template <typename V>
PYCOMM_INLINE V load_vector(const std::byte* from) {
  V vector;
  __builtin_memcpy(&vector, from, sizeof(V));  // an unaligned load
  return vector;
}

template <typename V>
PYCOMM_INLINE void store_vector(std::byte* to, V vector) {
  __builtin_memcpy(to, &vector, sizeof(V));
}

// What a fold is carried in: how lanes are combined and finished.

/// How the divisor is applied. A power of two has an exact reciprocal, and then the product and the
/// quotient are the same real number, rounded once: the same bits, several times faster.
enum class Division { kNone, kReciprocal, kDivide };

/// The divisor and the factors of a call, in the type that the fold is carried in.
template <typename T>
struct Scale {
  Division division;
  T divisor;  // or its reciprocal
  T prescale;
  T postscale;

  explicit Scale(const FoldSpec& spec)
      : division(Division::kNone),
        divisor(static_cast<T>(spec.divisor)),
        prescale(static_cast<T>(spec.prescale)),
        postscale(static_cast<T>(spec.postscale)) {
    if (spec.divisor == 1) return;
    const bool power_of_two = (spec.divisor & (spec.divisor - 1)) == 0;
    division = power_of_two ? Division::kReciprocal : Division::kDivide;
    if (power_of_two) divisor = T(1) / divisor;
  }
};

/// Of a fold that scales nothing.
struct NoScale {
  explicit NoScale(const FoldSpec&) {}
};

template <typename T, typename Bits, Bits quiet_nan_bits>
struct FloatAccumulator {
  static constexpr std::size_t kLanes = kVectorBytes / sizeof(T);
  using V = Vector<T, kLanes>;
  using Scale = detail::Scale<T>;

  static PYCOMM_INLINE V sum(V a, V b) { return a + b; }
  static PYCOMM_INLINE V product(V a, V b) { return a * b; }

  // A NaN in `b` fails the comparison and is chosen by it, a NaN in `a` is put back.
  static PYCOMM_INLINE V minimum(V a, V b) {
    V smaller = a < b ? a : b;
    return a == a ? smaller : a;
  }
  static PYCOMM_INLINE V maximum(V a, V b) {
    V larger = a > b ? a : b;
    return a == a ? larger : a;
  }

  static PYCOMM_INLINE V prescaled(V value, const Scale& scale) { return value * scale.prescale; }
  static PYCOMM_INLINE V postscaled(V value, const Scale& scale) { return value * scale.postscale; }

  static PYCOMM_INLINE V divided(V value, const Scale& scale) {
    if (scale.division == Division::kReciprocal) return value * scale.divisor;
    if (scale.division == Division::kDivide) return value / scale.divisor;
    return value;
  }

  /// Makes every NaN the same one: which of two NaNs an addition returns depends on the order of
  /// its operands, which the compiler may swap.
  static PYCOMM_INLINE V finished(V value) {
    const Vector<Bits, kLanes> quiet_nan = Vector<Bits, kLanes>{} + quiet_nan_bits;
    return value == value ? value : (V)quiet_nan;
  }
};

using Float32Accumulator = FloatAccumulator<float, std::uint32_t, 0x7fc00000u>;
using Float64Accumulator = FloatAccumulator<double, std::uint64_t, 0x7ff8000000000000u>;

/// Carried unsigned, so that sums and products wrap; `Ordered` is the type that MIN and MAX
/// compare.
template <typename Unsigned, typename Ordered>
struct IntegerAccumulator {
  static constexpr std::size_t kLanes = kVectorBytes / sizeof(Unsigned);
  using V = Vector<Unsigned, kLanes>;
  using Scale = NoScale;
  using OrderedV = Vector<Ordered, kLanes>;

  static PYCOMM_INLINE V sum(V a, V b) { return a + b; }
  static PYCOMM_INLINE V product(V a, V b) { return a * b; }
  static PYCOMM_INLINE V minimum(V a, V b) { return (OrderedV)a < (OrderedV)b ? a : b; }
  static PYCOMM_INLINE V maximum(V a, V b) { return (OrderedV)a > (OrderedV)b ? a : b; }
  static PYCOMM_INLINE V conjunction(V a, V b) { return a & b; }
  static PYCOMM_INLINE V disjunction(V a, V b) { return a | b; }
  static PYCOMM_INLINE V exclusive(V a, V b) { return a ^ b; }

  static PYCOMM_INLINE V divided(V value, NoScale) { return value; }
  static PYCOMM_INLINE V finished(V value) { return value; }
};

using ByteAccumulator = IntegerAccumulator<std::uint8_t, std::uint8_t>;

// How elements lie in memory: each format widens one register of its accumulator and rounds it.

/// An element that is its own accumulator.
template <typename A>
struct Same {
  using Accumulator = A;
  using V = typename A::V;
  static constexpr std::size_t kElementBytes = sizeof(V) / A::kLanes;

  static PYCOMM_INLINE V load(const std::byte* from) { return load_vector<V>(from); }
  static PYCOMM_INLINE void store(std::byte* to, V value) { store_vector(to, value); }
};

/// bool as torch stores it, a byte of 0 or 1. Any other byte is true, and is 1 from here on.
struct Bool {
  using Accumulator = ByteAccumulator;
  using V = Accumulator::V;
  static constexpr std::size_t kElementBytes = 1;

  static PYCOMM_INLINE V load(const std::byte* from) { return (V)(load_vector<V>(from) != 0) & 1; }
  static PYCOMM_INLINE void store(std::byte* to, V value) { store_vector(to, value); }
};

constexpr std::size_t kFloatLanes = Float32Accumulator::kLanes;
using FloatV = Float32Accumulator::V;
using WordV = Vector<std::uint32_t, kFloatLanes>;

// 16-bit elements zero-extended to words, and words below 2^16 back to 16 bits.
// __builtin_convertvector says the same, but GCC 12 takes it apart lane by lane on x86. Where a
// mask holds all lanes, it is because the forms without one warn of an operand they do not use.
#if PYCOMM_FOLD_VECTOR_BYTES == 64
constexpr __mmask16 kAllLanes = 0xffff;

PYCOMM_INLINE WordV load_words(const std::byte* from) {
  return (WordV)_mm512_maskz_cvtepu16_epi32(kAllLanes, load_vector<__m256i>(from));
}
PYCOMM_INLINE void store_words(std::byte* to, WordV words) {
  store_vector(to, _mm512_maskz_cvtepi32_epi16(kAllLanes, (__m512i)words));
}
#elif PYCOMM_FOLD_VECTOR_BYTES == 32
PYCOMM_INLINE WordV load_words(const std::byte* from) {
  return (WordV)_mm256_cvtepu16_epi32(load_vector<__m128i>(from));
}
PYCOMM_INLINE void store_words(std::byte* to, WordV words) {
  __m256i packed = _mm256_packus_epi32((__m256i)words, (__m256i)words);  // within 128-bit halves
  store_vector(to, _mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0b1000)));
}
#elif defined(__x86_64__)
PYCOMM_INLINE WordV load_words(const std::byte* from) {
  return (WordV)_mm_unpacklo_epi16(_mm_cvtsi64_si128(load_vector<long long>(from)),
                                   _mm_setzero_si128());
}
PYCOMM_INLINE void store_words(std::byte* to, WordV words) {
  // SSE2 packs with signed saturation only: sign-extend, so that nothing saturates.
  __m128i extended = _mm_srai_epi32(_mm_slli_epi32((__m128i)words, 16), 16);
  store_vector<long long>(to, _mm_cvtsi128_si64(_mm_packs_epi32(extended, extended)));
}
#else
using HalfV = Vector<std::uint16_t, kFloatLanes>;

PYCOMM_INLINE WordV load_words(const std::byte* from) {
  return __builtin_convertvector(load_vector<HalfV>(from), WordV);
}
PYCOMM_INLINE void store_words(std::byte* to, WordV words) {
  store_vector(to, __builtin_convertvector(words, HalfV));
}
#endif

/// Nearest even: adding just under half of the last kept place carries exactly when it should. The
/// result is in the upper half of each word. `value` went through finished(), whose NaN does
/// not carry into the sign.
PYCOMM_INLINE WordV round_to_bfloat16(FloatV value) {
  WordV bits = (WordV)value;
  return bits + 0x7fffu + ((bits >> 16) & 1u);
}

/// bfloat16 from or to float32.
struct BFloat16 {
  using Accumulator = Float32Accumulator;
  static constexpr std::size_t kElementBytes = 2;

  static PYCOMM_INLINE FloatV load(const std::byte* from) {
    return (FloatV)(load_words(from) << 16);
  }
  static PYCOMM_INLINE void store(std::byte* to, FloatV value) {
    store_words(to, round_to_bfloat16(value) >> 16);
  }
};

/// The even and the odd elements of a register of 16-bit ones, each in a float32 register.
struct EvenOddAccumulator {
  using A = Float32Accumulator;
  using Scale = A::Scale;
  static constexpr std::size_t kLanes = 2 * A::kLanes;
  struct V {
    FloatV even;
    FloatV odd;
  };

  static PYCOMM_INLINE V sum(V a, V b) { return {A::sum(a.even, b.even), A::sum(a.odd, b.odd)}; }
  static PYCOMM_INLINE V product(V a, V b) {
    return {A::product(a.even, b.even), A::product(a.odd, b.odd)};
  }
  static PYCOMM_INLINE V minimum(V a, V b) {
    return {A::minimum(a.even, b.even), A::minimum(a.odd, b.odd)};
  }
  static PYCOMM_INLINE V maximum(V a, V b) {
    return {A::maximum(a.even, b.even), A::maximum(a.odd, b.odd)};
  }
  static PYCOMM_INLINE V prescaled(V value, const Scale& scale) {
    return {A::prescaled(value.even, scale), A::prescaled(value.odd, scale)};
  }
  static PYCOMM_INLINE V divided(V value, const Scale& scale) {
    return {A::divided(value.even, scale), A::divided(value.odd, scale)};
  }
  static PYCOMM_INLINE V postscaled(V value, const Scale& scale) {
    return {A::postscaled(value.even, scale), A::postscaled(value.odd, scale)};
  }
  static PYCOMM_INLINE V finished(V value) {
    return {A::finished(value.even), A::finished(value.odd)};
  }
};

/// bfloat16 from and to bfloat16. In a word that holds two of them each is one shift or mask away
/// from its float32, which spares the shuffles of BFloat16. Little-endian: the even one is low.
struct BFloat16Pairs {
  using Accumulator = EvenOddAccumulator;
  static constexpr std::size_t kElementBytes = 2;

  static PYCOMM_INLINE Accumulator::V load(const std::byte* from) {
    WordV pairs = load_vector<WordV>(from);
    return {(FloatV)(pairs << 16), (FloatV)(pairs & 0xffff0000u)};
  }
  static PYCOMM_INLINE void store(std::byte* to, Accumulator::V value) {
    store_vector(
        to, (round_to_bfloat16(value.even) >> 16) | (round_to_bfloat16(value.odd) & 0xffff0000u));
  }
};

struct Float16 {
  using Accumulator = Float32Accumulator;
  static constexpr std::size_t kElementBytes = 2;

#if PYCOMM_FOLD_VECTOR_BYTES == 64
  static PYCOMM_INLINE FloatV load(const std::byte* from) {
    return (FloatV)_mm512_maskz_cvtph_ps(kAllLanes, load_vector<__m256i>(from));
  }
  static PYCOMM_INLINE void store(std::byte* to, FloatV value) {
    store_vector(to, _mm512_maskz_cvtps_ph(kAllLanes, (__m512)value, _MM_FROUND_TO_NEAREST_INT));
  }
#elif PYCOMM_FOLD_VECTOR_BYTES == 32
  static PYCOMM_INLINE FloatV load(const std::byte* from) {
    return (FloatV)_mm256_cvtph_ps(load_vector<__m128i>(from));
  }
  static PYCOMM_INLINE void store(std::byte* to, FloatV value) {
    store_vector(to, _mm256_cvtps_ph((__m256)value, _MM_FROUND_TO_NEAREST_INT));
  }
#else
  // Source: F. Giesen's branch-free conversions, https://gist.github.com/rygorous/2156668 (public
  // domain). The binary16 exponent is moved into place and rebased by 127 - 15.
  static constexpr std::uint32_t kRebase = 112u << 23;

  static PYCOMM_INLINE FloatV load(const std::byte* from) {
    WordV half = load_words(from);
    WordV magnitude = (half & 0x7fffu) << 13;
    WordV normal = magnitude + kRebase;
    WordV infinite_or_nan = normal + kRebase;  // the largest exponent again
    // A subnormal is given the smallest normal exponent; subtracting 2^-14 then normalises it.
    const WordV implicit_one = WordV{} + (113u << 23);
    WordV subnormal = (WordV)((FloatV)(magnitude + (113u << 23)) - (FloatV)implicit_one);
    WordV bits = magnitude >= (0x7c00u << 13)  ? infinite_or_nan
                 : magnitude < (0x0400u << 13) ? subnormal
                                               : normal;
    return (FloatV)(bits | (half & 0x8000u) << 16);
  }

  static PYCOMM_INLINE void store(std::byte* to, FloatV value) {
    WordV bits = (WordV)value;
    WordV sign = bits & 0x80000000u;
    WordV magnitude = bits ^ sign;
    WordV infinity_or_nan = magnitude > 0x7f800000u ? WordV{} + 0x7e00u : WordV{} + 0x7c00u;
    // The last place of 0.5 is 2^-24, the unit of subnormals: the addition rounds to it.
    const WordV half = WordV{} + (126u << 23);
    WordV subnormal = (WordV)((FloatV)magnitude + (FloatV)half) - half;
    WordV normal = (magnitude - kRebase + 0x0fffu + ((magnitude >> 13) & 1u)) >> 13;
    WordV rounded = magnitude >= (143u << 23)  ? infinity_or_nan  // from 2^16 on
                    : magnitude < (113u << 23) ? subnormal        // below 2^-14
                                               : normal;          // may carry into infinity
    store_words(to, rounded | sign >> 16);
  }
#endif
};

template <typename A>
struct Sum {
  static PYCOMM_INLINE typename A::V combine(typename A::V a, typename A::V b) {
    return A::sum(a, b);
  }
};
template <typename A>
struct Product {
  static PYCOMM_INLINE typename A::V combine(typename A::V a, typename A::V b) {
    return A::product(a, b);
  }
};
template <typename A>
struct Minimum {
  static PYCOMM_INLINE typename A::V combine(typename A::V a, typename A::V b) {
    return A::minimum(a, b);
  }
};
template <typename A>
struct Maximum {
  static PYCOMM_INLINE typename A::V combine(typename A::V a, typename A::V b) {
    return A::maximum(a, b);
  }
};

template <typename A>
struct And {
  static PYCOMM_INLINE typename A::V combine(typename A::V a, typename A::V b) {
    return A::conjunction(a, b);
  }
};
template <typename A>
struct Or {
  static PYCOMM_INLINE typename A::V combine(typename A::V a, typename A::V b) {
    return A::disjunction(a, b);
  }
};
template <typename A>
struct Xor {
  static PYCOMM_INLINE typename A::V combine(typename A::V a, typename A::V b) {
    return A::exclusive(a, b);
  }
};

/// As a constant number of sources or destinations: not constant, read it from the call.
constexpr std::size_t kAny = 0;

/// The call's pointers, copied if their number is constant: they then stay in registers, where
/// otherwise every store could have changed them as far as the compiler knows.
template <typename Pointer, std::size_t count>
struct PointersOf {
  Pointer at[count];
  explicit PYCOMM_INLINE PointersOf(const Pointer* pointers) {
    for (std::size_t p = 0; p < count; ++p) at[p] = pointers[p];
  }
  PYCOMM_INLINE Pointer operator[](std::size_t p) const { return at[p]; }
};
template <typename Pointer>
struct PointersOf<Pointer, kAny> {
  const Pointer* at;
  explicit PYCOMM_INLINE PointersOf(const Pointer* pointers) : at(pointers) {}
  PYCOMM_INLINE Pointer operator[](std::size_t p) const { return at[p]; }
};

/// One pass over the elements: each register is loaded from every source in order, finished and
/// stored, so partial results never touch memory. Source and Destination share their accumulator.
/// `scaled`: multiply by prescale and postscale. A factor of 1 changes no bit, so both always are.
template <typename Source, typename Destination, template <typename> typename Op,
          std::size_t source_constant, std::size_t destination_constant, bool scaled>
class Loop {
 public:
  static void run(const FoldCall& call) {
    Loop loop(call);
    const std::size_t count = call.count;
    std::size_t i = 0;
    if (count > kTile) {
      i = elements_to_alignment(call.destinations[0]);
      if (i > 0) loop.fold_part(0, i);
    }
    const bool prefetches = loop.source_count() == 2 || loop.source_count() >= kPrefetchSources;
    if (prefetches && count >= 2 * kAhead) {
      for (; i + kTile + kAhead <= count; i += kTile)
        loop.template fold_registers<kVectors, true>(i);
    }
    for (; i + kTile <= count; i += kTile) loop.template fold_registers<kVectors, false>(i);
    for (; i + kLanes <= count; i += kLanes) loop.template fold_registers<1, false>(i);
    if (i < count) loop.fold_part(i, count - i);
  }

 private:
  using Accumulator = typename Source::Accumulator;
  using V = typename Accumulator::V;
  static constexpr std::size_t kLanes = Accumulator::kLanes;
  static constexpr std::size_t kVectors = source_constant == 2 ? kPairTileVectors : kTileVectors;
  static constexpr std::size_t kTile = kVectors * kLanes;
  static constexpr std::size_t kAhead =
      (source_constant == 2 ? kPairPrefetchBytes : kPrefetchBytes) / Source::kElementBytes;

  explicit PYCOMM_INLINE Loop(const FoldCall& call)
      : sources_(call.sources),
        source_count_(call.source_count),
        destinations_(call.destinations),
        destination_count_(call.destination_count),
        scale_(call.spec) {}

  /// Everything is read before anything is written, so a destination may be a source.
  template <std::size_t registers, bool prefetching>
  PYCOMM_INLINE void fold_registers(std::size_t i) {
    V folded[registers];
    if (prefetching) prefetch(0, i, registers);
    for (std::size_t r = 0; r < registers; ++r) folded[r] = load(0, i + r * kLanes);
    for (std::size_t s = 1; s < source_count(); ++s) {
      if (prefetching) prefetch(s, i, registers);
      for (std::size_t r = 0; r < registers; ++r) {
        folded[r] = Op<Accumulator>::combine(folded[r], load(s, i + r * kLanes));
      }
    }
    for (std::size_t r = 0; r < registers; ++r) folded[r] = finished(folded[r]);
    for (std::size_t d = 0; d < destination_count(); ++d) {
      for (std::size_t r = 0; r < registers; ++r) {
        Destination::store(destinations_[d] + (i + r * kLanes) * Destination::kElementBytes,
                           folded[r]);
      }
    }
  }

  /// Stores that cross a cache line cost twice; always fewer than kLanes elements.
  static std::size_t elements_to_alignment(const std::byte* destination) {
    constexpr std::size_t kStoreBytes = kLanes * Destination::kElementBytes;
    std::size_t bytes = -reinterpret_cast<std::uintptr_t>(destination) % kStoreBytes;
    return bytes / Destination::kElementBytes;
  }

  /// Less than a register at either end: the same operations on copies padded with zeros.
  __attribute__((noinline)) void fold_part(std::size_t i, std::size_t rest) {
    std::byte padded[sizeof(V)] = {};  // of sources and destination: neither is wider than V
    V folded{};
    for (std::size_t s = 0; s < source_count(); ++s) {
      __builtin_memcpy(padded, sources_[s] + i * Source::kElementBytes,
                       rest * Source::kElementBytes);
      V next = prescaled(Source::load(padded));
      folded = s == 0 ? next : Op<Accumulator>::combine(folded, next);
    }
    Destination::store(padded, finished(folded));
    for (std::size_t d = 0; d < destination_count(); ++d) {
      __builtin_memcpy(destinations_[d] + i * Destination::kElementBytes, padded,
                       rest * Destination::kElementBytes);
    }
  }

  PYCOMM_INLINE V load(std::size_t s, std::size_t i) const {
    return prescaled(Source::load(sources_[s] + i * Source::kElementBytes));
  }
  PYCOMM_INLINE V prescaled(V value) const {
    if constexpr (scaled) return Accumulator::prescaled(value, scale_);
    return value;
  }
  PYCOMM_INLINE V finished(V value) const {
    value = Accumulator::divided(value, scale_);
    if constexpr (scaled) value = Accumulator::postscaled(value, scale_);
    return Accumulator::finished(value);
  }
  PYCOMM_INLINE void prefetch(std::size_t s, std::size_t i, std::size_t registers) const {
    const std::byte* ahead = sources_[s] + (i + kAhead) * Source::kElementBytes;
    const std::size_t bytes = registers * kLanes * Source::kElementBytes;
    for (std::size_t b = 0; b < bytes; b += kCacheLineBytes) __builtin_prefetch(ahead + b);
  }
  PYCOMM_INLINE std::size_t source_count() const {
    return source_constant == kAny ? source_count_ : source_constant;
  }
  PYCOMM_INLINE std::size_t destination_count() const {
    return destination_constant == kAny ? destination_count_ : destination_constant;
  }

  PointersOf<const std::byte*, source_constant> sources_;
  std::size_t source_count_;
  PointersOf<std::byte*, destination_constant> destinations_;
  std::size_t destination_count_;
  typename Accumulator::Scale scale_;
};

template <typename Scale>
constexpr bool kScales = true;
template <>
constexpr bool kScales<NoScale> = false;

/// Two sources are the step of a ring and the common host of two ranks; with two destinations, the
/// whole all-reduce of that host in one pass. Factors are rare enough to do with the general loop.
template <typename Source, typename Destination, template <typename> typename Op>
void run_loop(const FoldCall& call) {
  if constexpr (kScales<typename Source::Accumulator::Scale>) {
    if (call.spec.prescale != 1 || call.spec.postscale != 1) {
      return Loop<Source, Destination, Op, kAny, kAny, true>::run(call);
    }
  }
  if (call.source_count == 2 && call.destination_count == 1) {
    Loop<Source, Destination, Op, 2, 1, false>::run(call);
  } else if (call.source_count == 2 && call.destination_count == 2) {
    Loop<Source, Destination, Op, 2, 2, false>::run(call);
  } else {
    Loop<Source, Destination, Op, kAny, kAny, false>::run(call);
  }
}

/// fold.cpp makes the bitwise ops of every integer those of bytes.
void run_bitwise(const FoldCall& call) {
  using Bytes = Same<ByteAccumulator>;
  switch (call.spec.op) {
    case ReduceOp::kBand:
      return run_loop<Bytes, Bytes, And>(call);
    case ReduceOp::kBor:
      return run_loop<Bytes, Bytes, Or>(call);
    default:
      return run_loop<Bytes, Bytes, Xor>(call);
  }
}

/// Two values, so every op is one of three.
void run_bool(const FoldCall& call) {
  switch (call.spec.op) {
    case ReduceOp::kSum:
    case ReduceOp::kMax:
    case ReduceOp::kBor:
      return run_loop<Bool, Bool, Or>(call);
    case ReduceOp::kProd:
    case ReduceOp::kMin:
    case ReduceOp::kBand:
      return run_loop<Bool, Bool, And>(call);
    default:
      return run_loop<Bool, Bool, Xor>(call);
  }
}

template <typename Source, typename Destination = Source>
void run_op(const FoldCall& call) {
  switch (call.spec.op) {
    case ReduceOp::kSum:
    case ReduceOp::kAvg:
      return run_loop<Source, Destination, Sum>(call);
    case ReduceOp::kMin:
      return run_loop<Source, Destination, Minimum>(call);
    case ReduceOp::kMax:
      return run_loop<Source, Destination, Maximum>(call);
    case ReduceOp::kProd:
      return run_loop<Source, Destination, Product>(call);
    case ReduceOp::kBand:
    case ReduceOp::kBor:
    case ReduceOp::kBxor:
      return run_bitwise(call);
  }
}

using Float32 = Same<Float32Accumulator>;

}  // namespace

void PYCOMM_FOLD_FUNCTION(const FoldCall& call) {
  switch (call.spec.source_dtype) {
    case DType::kBool:
      return run_bool(call);
    case DType::kUint8:
      return run_op<Same<ByteAccumulator>>(call);
    case DType::kInt8:
      return run_op<Same<IntegerAccumulator<std::uint8_t, std::int8_t>>>(call);
    case DType::kInt16:
      return run_op<Same<IntegerAccumulator<std::uint16_t, std::int16_t>>>(call);
    case DType::kInt32:
      return run_op<Same<IntegerAccumulator<std::uint32_t, std::int32_t>>>(call);
    case DType::kInt64:
      return run_op<Same<IntegerAccumulator<std::uint64_t, std::int64_t>>>(call);
    case DType::kFloat16:
      if (call.spec.destination_dtype == DType::kFloat32) return run_op<Float16, Float32>(call);
      return run_op<Float16>(call);
    case DType::kBFloat16:
      if (call.spec.destination_dtype == DType::kFloat32) return run_op<BFloat16, Float32>(call);
      return run_op<BFloat16Pairs>(call);
    case DType::kFloat32:
      if (call.spec.destination_dtype == DType::kFloat16) return run_op<Float32, Float16>(call);
      if (call.spec.destination_dtype == DType::kBFloat16) return run_op<Float32, BFloat16>(call);
      return run_op<Float32>(call);
    case DType::kFloat64:
      return run_op<Same<Float64Accumulator>>(call);
    case DType::kComplex64:  // fold.cpp makes them their components
    case DType::kComplex128:
    case DType::kFloat8E4M3Fn:  // and refuses these
    case DType::kFloat8E4M3Fnuz:
    case DType::kFloat8E5M2:
    case DType::kFloat8E5M2Fnuz:
    case DType::kFloat8E8M0Fnu:
      return;
  }
}

}  // namespace pycomm::detail
