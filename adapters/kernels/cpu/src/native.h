// What Python and the kernels say to each other: plain structs and C functions, no torch.
//
// Every kernel's result for a token depends on that token's own inputs alone: not on the other tokens of the
// step, on how prompts were cut into chunks, on where pages lie, or on the number of threads. Each sum is
// formed by one thread in one fixed order.
#pragma once
#include <cstdint>

typedef uint16_t bf16;

// What becomes of a linear's own output for one adapter, in float32: y = scale * y + shift. Null = by 1, by 0.
struct Adjust {
    const float *scale, *shift;  // [out]
};

// One linear's adapters, all of them: rank rows, and by slot which rows are whose (see adapters/pool/site_pool.py).
struct LoraSite {
    const bf16* a;               // [rows, in]
    const bf16* b;               // [rows, out], the adapters' scale folded in
    int64_t in, out;
    const int32_t* const* rows;  // [slots] the slot's rows
    const int32_t* ranks;        // [slots] how many; may be 0
    const Adjust* adjusts;       // [slots]
};

// Tokens [start, stop) use the adapter in `slot`.
struct Segment {
    int64_t slot, start, stop;
};

struct LoraCall {
    const LoraSite* const* sites;  // [n_sites] linears that share the input x
    bf16* const* y;                // [n_sites] [tokens, out], added to
    const int64_t* y_strides;      // [n_sites] elements from one token to the next
    int64_t n_sites;
    const bf16* x;                 // [tokens, in]
    int64_t x_stride;
    const Segment* segments;
    int64_t n_segments;
};

// Keys and values live in tiles of 16 tokens for one head; see attention.h for the order within a tile.
struct Pages {
    bf16* keys;    // [tiles, kv_heads, 16 * head_dim]
    bf16* values;  // [tiles, kv_heads, 16 * head_dim]
    int64_t kv_heads, head_dim;
};

// Which tokens there are in a step, and where their sequences' tiles are.
struct Tokens {
    int64_t count;
    const int64_t* kv_slots;    // [count] where the token's own key and value go: tile * 16 + place
    const int64_t* positions;   // [count] in its sequence, from 0
    const int64_t* sequences;   // [count] index into tile_starts
    const int64_t* tile_starts; // [sequences] where the sequence's tiles begin in `tiles`
    const int64_t* tiles;       // tile ids, in order of position
};

struct AttentionCall {
    const Pages* pages;
    const Tokens* tokens;
    const bf16* q;             // [count, heads, head_dim]
    const bf16* k;             // [count, kv_heads, head_dim]
    const bf16* v;             // [count, kv_heads, head_dim]
    int64_t q_stride, k_stride, v_stride;  // elements from one token to the next
    bf16* out;                 // [count, heads, head_dim], contiguous
    int64_t heads;
    float scale;
    float softcap;             // 0 = none
    int64_t window;            // a token sees so many latest ones, itself included; 0 = all
};

struct Linear {
    const uint8_t* w;      // [out / 32, in / 2, 32] packed by bitsandbytes for CPUs, see nf4.h
    const bf16* absmax;    // [in / blocksize, out]
    const bf16* bias;      // [out] or null
    int64_t in, out, blocksize;
    const LoraSite* lora;
};

// Linears that share their input; each writes its own y.
struct LinearCall {
    const Linear* const* linears;  // [n_linears]
    bf16* const* y;                // [n_linears] [count, out]
    int64_t n_linears;
    int64_t y_stride;              // elements from one token to the next, the same for all
    const bf16* x;                 // [count, in]
    int64_t x_stride, count;
    const bf16* codebook;          // [16] NF4's values
};

// One norm's weights, float32: the base's (null = there is no such norm), and those of adapters with their own.
struct Norm {
    const float* weight;             // [hidden], or [head_dim] of the head norms
    const float* const* const* by_slot;  // a cell -> [slots]; null = the base's
};

struct Block {
    Linear q, k, v, o, gate, up, down;
    Norm norm_before_attention, norm_after_attention, norm_before_mlp, norm_after_mlp, q_norm, k_norm;
    Pages pages;
    int64_t window;
};

// What a step's time goes to.
enum Part { LINEARS, LORA, ATTENTION, ROWS, PARTS };

struct Scratch {           // bf16, for the largest step
    bf16 *normed, *qkv, *attended, *gate_up, *delta;
};

struct StackCall {
    Block* blocks;
    int64_t n_blocks;
    int64_t hidden, heads, head_dim, intermediate;
    float eps, scale, softcap;
    int64_t gelu;                // 0 = SiLU, 1 = GELU with tanh
    const bf16* codebook;        // [16] NF4's values
    bf16* x;                     // [tokens, hidden] embeddings in, the last block's output out
    const float *cosines, *sines;  // [positions, head_dim]
    const Tokens* tokens;
    const Segment* segments;
    int64_t n_segments;
    const int64_t* norm_slots;   // [tokens] whose norms, -1 = the base's; null = the base's for all
    Scratch scratch;
    int64_t* nanoseconds;        // [PARTS] added to
};

// out[i] = cap(norm(x[rows[i]]) @ W^T) in float32, where cap(z) = softcap * tanh(z / softcap).
struct HeadCall {
    const bf16* x;            // [tokens, hidden]
    const int64_t* rows;      // [n] which tokens
    int64_t n, hidden, vocabulary;
    const float* norm;        // [hidden]
    float eps, softcap;       // softcap 0 = none
    const bf16* w;            // [vocabulary / 16, hidden / 2, 16, 2], the last group padded with zeros; or null:
    const Linear* nf4;        // the head in 4 bits, its vocabulary a multiple of 32
    const bf16* codebook;     // [16] NF4's values, for that
    bf16* normed;             // [n, hidden] scratch
    float* out;               // [n, vocabulary rounded up to 16]
};

struct Kernels {
    const char* name;
    void (*linears)(const LinearCall*);
    void (*lora)(const LoraCall*);
    void (*attention)(const AttentionCall*);
    void (*stack)(const StackCall*);
    void (*head)(const HeadCall*);
};
