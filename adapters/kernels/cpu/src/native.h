// The interface between Python and the kernels: plain structs and C functions, no torch.
//
// A kernel's result for a token depends only on that token's inputs. It does not depend on the other tokens of the
// step, on how a prompt was split into chunks, on which pages hold its keys and values, or on the number of threads.
// One thread computes each sum, always in the same order.
#pragma once
#include <cstdint>

typedef uint16_t bf16;

// How one adapter changes a linear's output, in float32: y = scale * y + shift. A null scale is 1, a null shift is 0.
struct Adjust {
    const float *scale, *shift;  // [out]
};

// All adapters of one linear: the rank rows, and which rows belong to each slot (see adapters/pool/site_pool.py).
struct LoraSite {
    const bf16* a;  // [rows, in]
    const bf16* b;  // [rows, out], multiplied by the adapter's LoRA scale
    int64_t in, out;
    const int32_t* const* rows;  // [slots] the rows of each slot
    const int32_t* ranks;        // [slots] the number of rows; may be 0
    const Adjust* adjusts;       // [slots]
};

// Tokens [start, stop) use the adapter in `slot`.
struct Segment {
    int64_t slot, start, stop;
};

struct LoraCall {
    const LoraSite* const* sites;  // [n_sites] linears that share the input x
    bf16* const* y;                // [n_sites] [tokens, out], updated in place
    const int64_t* y_strides;      // [n_sites] elements from one token to the next
    int64_t n_sites;
    const bf16* x;  // [tokens, in]
    int64_t x_stride;
    const Segment* segments;
    int64_t n_segments;
};

// Keys and values are stored in tiles. A tile has 16 tokens of one head. See attention.h for the order within a tile.
struct Pages {
    bf16* keys;    // [tiles, kv_heads, 16 * head_dim]
    bf16* values;  // [tiles, kv_heads, 16 * head_dim]
    int64_t kv_heads, head_dim;
};

// The tokens of a step, and the tiles of their sequences.
struct Tokens {
    int64_t count;
    const int64_t* kv_slots;     // [count] where the token's key and value are stored: tile * 16 + place
    const int64_t* positions;    // [count] position in the sequence, from 0
    const int64_t* sequences;    // [count] index into tile_starts
    const int64_t* tile_starts;  // [sequences] index of the sequence's first tile in `tiles`
    const int64_t* tiles;        // tile ids, in order of position
};

struct AttentionCall {
    const Pages* pages;
    const Tokens* tokens;
    const bf16* q;                         // [count, heads, head_dim]
    const bf16* k;                         // [count, kv_heads, head_dim]
    const bf16* v;                         // [count, kv_heads, head_dim]
    int64_t q_stride, k_stride, v_stride;  // elements from one token to the next
    bf16* out;                             // [count, heads, head_dim], contiguous
    int64_t heads;
    float scale;
    float softcap;   // 0 = none
    int64_t window;  // a token attends to this many latest tokens, itself included; 0 = all
};

struct Linear {
    const uint8_t* w;    // [out / 32, in / 2, 32] as bitsandbytes packs for CPUs, see nf4.h
    const bf16* absmax;  // [in / blocksize, out]
    const bf16* bias;    // [out] or null
    int64_t in, out, blocksize;
    const LoraSite* lora;
};

// Linears that share their input. Each writes its own y.
struct LinearCall {
    const Linear* const* linears;  // [n_linears]
    bf16* const* y;                // [n_linears] [count, out]
    int64_t n_linears;
    int64_t y_stride;  // elements from one token to the next, the same for all
    const bf16* x;     // [count, in]
    int64_t x_stride, count;
    const bf16* codebook;  // [16] NF4's values
};

// One matrix of all experts of a layer. Rows [starts[i], starts[i + 1]) of x and y belong to the expert chosen[i].
struct ExpertsCall {
    const uint8_t* w;    // [experts, out / 32, in / 2, 32], each expert as in Linear
    const bf16* absmax;  // [experts, in / blocksize, out]
    int64_t in, out, blocksize;
    const int64_t* chosen;  // [n_chosen]
    const int64_t* starts;  // [n_chosen + 1]
    int64_t n_chosen;
    const bf16* x;         // [rows, in], contiguous
    bf16* y;               // [rows, out], contiguous
    const bf16* codebook;  // [16] NF4's values
};

// The float32 weights of one norm: the base's, and those of the adapters that replace them.
struct Norm {
    const float* weight;  // [hidden], or [head_dim] for q_norm and k_norm; null = the model has no such norm
    const float* const* const* by_slot;  // points to a table [slots]; a null entry = the base's weights
};

// Linears that share their input and write their outputs side by side.
struct Product {
    Linear parts[3];
    int64_t n;
};

struct Block {
    Product qkv, o, gate_up, down;  // q, k and v (gate and up) are separate parts, or one part computes all of them
    Norm norm_before_attention, norm_after_attention, norm_before_mlp, norm_after_mlp, q_norm, k_norm;
    Pages pages;
    const float *cosines, *sines;  // [positions, rotary_dim]
    int64_t window;
};

// The parts of a step whose time is measured.
enum Part { LINEARS, LORA, ATTENTION, ROWS, PARTS };

// Temporary memory, bf16, sized for the largest step.
struct Scratch {
    bf16 *normed, *qkv, *attended, *gate_up, *delta;
};

struct StackCall {
    Block* blocks;
    int64_t n_blocks;
    int64_t hidden, heads, head_dim, intermediate;
    int64_t rotary_dim;  // the first dimensions of a head are rotated, the others stay as they are
    float eps, scale, softcap;
    int64_t gelu;          // 0 = SiLU, 1 = GELU with tanh
    const bf16* codebook;  // [16] NF4's values
    bf16* x;               // [tokens, hidden] in: embeddings; out: the last block's output
    const Tokens* tokens;
    const Segment* segments;
    int64_t n_segments;
    const int64_t* norm_slots;  // [tokens] slot whose norms to use, -1 = the base's; null = the base's for all
    Scratch scratch;
    int64_t* nanoseconds;  // [PARTS] time spent in each part, added up
};

// out[i] = cap(norm(x[rows[i]]) @ W^T) in float32, where cap(z) = softcap * tanh(z / softcap).
struct HeadCall {
    const bf16* x;        // [tokens, hidden]
    const int64_t* rows;  // [n] indices of tokens
    int64_t n, hidden, vocabulary;
    const float* norm;     // [hidden]
    float eps, softcap;    // softcap 0 = none
    const bf16* w;         // [vocabulary / 16, hidden / 2, 16, 2], the last group padded with zeros; null = use nf4
    const Linear* nf4;     // the head in 4 bits; its vocabulary is a multiple of 32
    const bf16* codebook;  // [16] NF4's values, for nf4
    bf16* normed;          // [n, hidden] temporary
    float* out;            // [n, vocabulary rounded up to 16]
};

struct Kernels {
    const char* name;
    void (*linears)(const LinearCall*);
    void (*experts)(const ExpertsCall*);
    void (*lora)(const LoraCall*);
    void (*attention)(const AttentionCall*);
    void (*stack)(const StackCall*);
    void (*head)(const HeadCall*);
};
