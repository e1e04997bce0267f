// Metal's 16-bit floats: every operation rounds to the type, as native arithmetic does.
#pragma once
#include <cstdint>
#include <cstring>
#include <type_traits>

#define HOST_INLINE inline __attribute__((__always_inline__))

namespace host {
struct Bits {};  // tag: construct from a bit pattern

template <class To, class From>
HOST_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "sizes differ");
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}
HOST_INLINE uint16_t float_to_half(float f) { return bit_cast<uint16_t>((_Float16)f); }
HOST_INLINE float half_to_float(uint16_t u) { return (float)bit_cast<_Float16>(u); }
HOST_INLINE uint16_t float_to_bfloat(float f) {  // round to nearest, ties to even
  const uint32_t u = bit_cast<uint32_t>(f);
  if ((u & 0x7fffffffu) > 0x7f800000u) return uint16_t((u >> 16) | 0x40);
  return uint16_t((u + 0x7fffu + ((u >> 16) & 1)) >> 16);
}
HOST_INLINE float bfloat_to_float(uint16_t u) {
  return bit_cast<float>(uint32_t(u) << 16);
}
template <class T>
using if_integer = typename std::enable_if<std::is_integral<T>::value>::type;
}  // namespace host

struct half {
  uint16_t bits;
  half() = default;
  constexpr half(host::Bits, uint16_t b) : bits(b) {}
  HOST_INLINE half(float f) : bits(host::float_to_half(f)) {}  // implicit in Metal
  template <class I, class = host::if_integer<I>>
  HOST_INLINE half(I i) : bits(host::float_to_half(float(i))) {}
  HOST_INLINE operator float() const { return host::half_to_float(bits); }
  constexpr half operator-() const { return half(host::Bits(), uint16_t(bits ^ 0x8000)); }
};

struct bfloat {  // widening is implicit in Metal, narrowing is not
  uint16_t bits;
  bfloat() = default;
  constexpr bfloat(host::Bits, uint16_t b) : bits(b) {}
  HOST_INLINE explicit bfloat(float f) : bits(host::float_to_bfloat(f)) {}
  HOST_INLINE explicit bfloat(half h) : bits(host::float_to_bfloat(float(h))) {}
  template <class I, class = host::if_integer<I>>
  HOST_INLINE explicit bfloat(I i) : bits(host::float_to_bfloat(float(i))) {}
  HOST_INLINE operator float() const { return host::bfloat_to_float(bits); }
  operator half() const = delete;
  constexpr bfloat operator-() const {
    return bfloat(host::Bits(), uint16_t(bits ^ 0x8000));
  }
};

namespace host {
template <class T> struct is_short_float : std::false_type {};
template <> struct is_short_float<half> : std::true_type {};
template <> struct is_short_float<bfloat> : std::true_type {};
template <class A, class B, class R>
using if_same =
    typename std::enable_if<is_short_float<A>::value && std::is_same<A, B>::value, R>::type;
template <class A, class I, class R>
using if_with_integer =
    typename std::enable_if<is_short_float<A>::value && std::is_integral<I>::value, R>::type;
}  // namespace host

#define HOST_OPERATOR(op)                                                          \
  template <class A, class B>                                                      \
  HOST_INLINE host::if_same<A, B, A> operator op(A a, B b) {                       \
    return A(float(a) op float(b));                                                \
  }                                                                                \
  template <class A, class I>                                                      \
  HOST_INLINE host::if_with_integer<A, I, A> operator op(A a, I i) {               \
    return A(float(a) op float(A(i)));                                             \
  }                                                                                \
  template <class I, class A>                                                      \
  HOST_INLINE host::if_with_integer<A, I, A> operator op(I i, A a) {               \
    return A(float(A(i)) op float(a));                                             \
  }                                                                                \
  template <class A, class B>                                                      \
  HOST_INLINE host::if_same<A, B, A&> operator op##=(A & a, B b) {                 \
    return a = A(float(a) op float(b));                                            \
  }
HOST_OPERATOR(+) HOST_OPERATOR(-) HOST_OPERATOR(*) HOST_OPERATOR(/)
#undef HOST_OPERATOR

#pragma GCC diagnostic ignored "-Wliteral-suffix"
HOST_INLINE half operator""h(long double v) { return half(float(v)); }
