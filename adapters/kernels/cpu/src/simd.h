// Operations on sixteen lanes, written with the compiler's vector types. Only `fma16` and `dot2` use intrinsics.
// kernels.h includes this file inside a namespace, once for each instruction set.
//
// The kernels are compiled with -ffp-contract=off, so only `fma16` fuses a product and a sum into one rounding.
// Otherwise the compiler could fuse them for one token and not for four, and results would differ in the last bit.

typedef float f32x16 __attribute__((vector_size(64)));
typedef uint32_t u32x16 __attribute__((vector_size(64)));
typedef int32_t i32x16 __attribute__((vector_size(64)));
typedef uint16_t u16x16 __attribute__((vector_size(32)));
typedef uint16_t u16x32 __attribute__((vector_size(64)));

template <typename V>
static inline V load(const void* p) {
    V v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
}

template <typename V>
static inline void store(void* p, V v) {
    __builtin_memcpy(p, &v, sizeof v);
}

static inline f32x16 splat(float x) { return f32x16{} + x; }
static inline u32x16 splat_pair(const bf16* pair) {
    uint32_t both;
    __builtin_memcpy(&both, pair, 4);
    return u32x16{} + both;
}

static inline float to_float(bf16 x) {
    uint32_t bits = uint32_t(x) << 16;
    float f;
    __builtin_memcpy(&f, &bits, 4);
    return f;
}

static inline f32x16 to_floats(u16x16 x) { return (f32x16)(__builtin_convertvector(x, u32x16) << 16); }

// Rounds to nearest even, as torch does. NaN stays NaN.
static inline u16x16 to_bf16s(f32x16 x) {
    u32x16 bits = (u32x16)x;
    u32x16 rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    i32x16 is_nan = x != x;
    rounded = is_nan ? u32x16{} + 0x7fc0 : rounded;
    return __builtin_convertvector(rounded, u16x16);
}

static inline bf16 to_bf16(float x) { return to_bf16s(splat(x))[0]; }

// a * b + c
static inline f32x16 fma16(f32x16 a, f32x16 b, f32x16 c) {
#if defined(__AVX512F__)
    return (f32x16)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#else
    return a * b + c;
#endif
}

// acc[i] += a[2i] * b[2i] + a[2i+1] * b[2i+1], for bf16 pairs in float32.
static inline f32x16 dot2(f32x16 acc, u32x16 a, u32x16 b) {
#ifdef __AVX512BF16__
    return (f32x16)_mm512_dpbf16_ps((__m512)acc, (__m512bh)a, (__m512bh)b);
#else
    acc = fma16((f32x16)(a << 16), (f32x16)(b << 16), acc);
    return fma16((f32x16)(a & 0xffff0000u), (f32x16)(b & 0xffff0000u), acc);
#endif
}

template <typename Op>
static inline float reduce(f32x16 v, Op op) {
    const i32x16 by8 = {8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7};
    const i32x16 by4 = {4, 5, 6, 7, 0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3};
    const i32x16 by2 = {2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1};
    const i32x16 by1 = {1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0};
    v = op(v, __builtin_shuffle(v, by8));
    v = op(v, __builtin_shuffle(v, by4));
    v = op(v, __builtin_shuffle(v, by2));
    v = op(v, __builtin_shuffle(v, by1));
    return v[0];
}

static inline f32x16 larger(f32x16 a, f32x16 b) { return a > b ? a : b; }
static inline float larger_of(float a, float b) { return a > b ? a : b; }
static inline float sum(f32x16 v) {
    return reduce(v, [](f32x16 a, f32x16 b) { return a + b; });
}
static inline float largest(f32x16 v) {
    return reduce(v, [](f32x16 a, f32x16 b) { return larger(a, b); });
}

// exp to about 2 ulp (Cephes' expf): 2^n * p(r), n = round(x / ln 2). The result is 0 below -87. NaN stays NaN.
static inline f32x16 exp16(f32x16 x) {
    const float round = 12582912.0f;  // 1.5 * 2^23: adding and subtracting it rounds to an integer
    f32x16 clamped = x < -87.0f ? splat(-87.0f) : x;
    clamped = clamped > 88.0f ? splat(88.0f) : clamped;
    f32x16 n = clamped * 1.44269504f + round - round;
    f32x16 r = fma16(n, splat(2.12194440e-4f), fma16(n, splat(-0.693359375f), clamped));
    f32x16 p = splat(1.9875691500e-4f);
    p = fma16(p, r, splat(1.3981999507e-3f));
    p = fma16(p, r, splat(8.3334519073e-3f));
    p = fma16(p, r, splat(4.1665795894e-2f));
    p = fma16(p, r, splat(1.6666665459e-1f));
    p = fma16(p, r, splat(5.0000001201e-1f));
    p = fma16(p, r * r, r) + 1.0f;
    i32x16 exponent = (__builtin_convertvector(n, i32x16) + 127) << 23;
    p *= (f32x16)exponent;
    p = x < -87.0f ? splat(0.0f) : p;
    return x != x ? x : p;
}

static inline f32x16 tanh16(f32x16 x) {
    f32x16 e = exp16(2.0f * x);
    return 1.0f - 2.0f / (e + 1.0f);
}

// Limits scores to (-cap, cap). A cap of 0 changes nothing.
static inline f32x16 softcapped(f32x16 x, float cap) { return cap > 0 ? cap * tanh16(x / cap) : x; }

// Sixteen bf16 of a row. Elements beyond `left` read as 0 and are not written.
static inline f32x16 load_floats(const bf16* p, int64_t left = 16) {
    if (left >= 16) return to_floats(load<u16x16>(p));
    u16x16 v = {};
    __builtin_memcpy(&v, p, 2 * left);
    return to_floats(v);
}

static inline void store_bf16s(bf16* p, f32x16 v, int64_t left = 16) {
    u16x16 rounded = to_bf16s(v);
    __builtin_memcpy(p, &rounded, 2 * (left >= 16 ? 16 : left));
}

// Sixteen bf16 pairs of a row. Elements beyond `left` read as 0.
static inline u32x16 load_pairs(const bf16* p, int64_t left = 32) {
    if (left >= 32) return load<u32x16>(p);
    u32x16 v = {};
    __builtin_memcpy(&v, p, 2 * left);
    return v;
}

// Pairs the columns of two rows: low[i] = (a[i], b[i]) for columns 0-15, and high for columns 16-31.
static inline void interleave(u32x16 a, u32x16 b, u32x16& low, u32x16& high) {
    const u16x32 first = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                          8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
    low = (u32x16)__builtin_shuffle((u16x32)a, (u16x32)b, first);
    high = (u32x16)__builtin_shuffle((u16x32)a, (u16x32)b, first + 16);
}
