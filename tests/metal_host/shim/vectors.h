// Metal's vectors of two, three and four elements, with Metal's alignment.
#pragma once
#include "half.h"

namespace metal {
template <class T, int N>
struct vec;

#define HOST_VECTOR(N)                                                      \
  HOST_INLINE T& operator[](int i) { return (&x)[i]; }                      \
  HOST_INLINE const T& operator[](int i) const { return (&x)[i]; }          \
  vec() = default;                                                          \
  HOST_INLINE explicit vec(T s) {                                           \
    for (int i = 0; i < N; ++i) (*this)[i] = s;                             \
  }                                                                         \
  template <class U>                                                        \
  HOST_INLINE explicit vec(vec<U, N> o) {                                   \
    for (int i = 0; i < N; ++i) (*this)[i] = T(o[i]);                       \
  }
template <class T>
struct alignas(2 * sizeof(T)) vec<T, 2> {
  T x, y;
  HOST_VECTOR(2)
  HOST_INLINE vec(T a, T b) : x(a), y(b) {}
};
template <class T>
struct alignas(4 * sizeof(T)) vec<T, 3> {
  T x, y, z;
  HOST_VECTOR(3)
  HOST_INLINE vec(T a, T b, T c) : x(a), y(b), z(c) {}
};
template <class T>
struct alignas(4 * sizeof(T)) vec<T, 4> {
  T x, y, z, w;
  HOST_VECTOR(4)
  HOST_INLINE vec(T a, T b, T c, T d) : x(a), y(b), z(c), w(d) {}
};
#undef HOST_VECTOR

#define HOST_OPERATOR(op)                                            \
  template <class T, int N>                                          \
  HOST_INLINE vec<T, N> operator op(vec<T, N> a, vec<T, N> b) {      \
    vec<T, N> r;                                                     \
    for (int i = 0; i < N; ++i) r[i] = T(a[i] op b[i]);              \
    return r;                                                        \
  }                                                                  \
  template <class T, int N>                                          \
  HOST_INLINE vec<T, N> operator op(vec<T, N> a, T b) {              \
    return a op vec<T, N>(b);                                        \
  }                                                                  \
  template <class T, int N>                                          \
  HOST_INLINE vec<T, N> operator op(T a, vec<T, N> b) {              \
    return vec<T, N>(a) op b;                                        \
  }                                                                  \
  template <class T, int N>                                          \
  HOST_INLINE vec<T, N>& operator op##=(vec<T, N>& a, vec<T, N> b) { \
    return a = a op b;                                               \
  }
HOST_OPERATOR(+) HOST_OPERATOR(-) HOST_OPERATOR(*) HOST_OPERATOR(/)
#undef HOST_OPERATOR

template <class T, int N>
HOST_INLINE T dot(vec<T, N> a, vec<T, N> b) {
  T r = a[0] * b[0];
  for (int i = 1; i < N; ++i) r = T(r + a[i] * b[i]);
  return r;
}
}  // namespace metal

#define HOST_VECTORS(T)           \
  typedef metal::vec<T, 2> T##2;  \
  typedef metal::vec<T, 3> T##3;  \
  typedef metal::vec<T, 4> T##4;
HOST_VECTORS(float) HOST_VECTORS(half) HOST_VECTORS(bfloat) HOST_VECTORS(int)
HOST_VECTORS(uint) HOST_VECTORS(short) HOST_VECTORS(ushort) HOST_VECTORS(uchar)
#undef HOST_VECTORS
