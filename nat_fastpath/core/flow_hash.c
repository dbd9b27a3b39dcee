/* SPDX-License-Identifier: Apache-2.0 */
#include "flow_hash.h"

#include <string.h>

#if defined(__x86_64__)
#include <wmmintrin.h>
#endif

/* Sixteen lanes of 32 bits: the compiler makes four SSE, two AVX2 or one AVX-512 operation of each line. */
typedef uint32_t lanes __attribute__((vector_size(64), aligned(4)));

#define HASH_MANY(suffix, attribute)                                                                         \
    attribute static void hash_many_##suffix(const struct flow_hasher *hasher, const uint64_t *addrs,        \
                                             const uint32_t *ports, const uint8_t *protocols,                \
                                             uint32_t *hashes, unsigned n)                                   \
    {                                                                                                        \
        (void)hasher;                                                                                        \
        for (unsigned i = 0; i < n; i += 16) {                                                               \
            lanes word[4], h;                                                                                \
            for (unsigned k = 0; k < 16; k++) {                                                              \
                word[0][k] = (uint32_t)addrs[i + k];                                                         \
                word[1][k] = (uint32_t)(addrs[i + k] >> 32);                                                 \
                word[2][k] = ports[i + k];                                                                   \
                word[3][k] = protocols[i + k];                                                               \
                h[k] = FNV_BASIS;                                                                            \
            }                                                                                                \
            for (unsigned w = 0; w < 3; w++) {                                                               \
                h = (h ^ (word[w] & 0xff)) * FNV_PRIME;                                                      \
                h = (h ^ (word[w] >> 8 & 0xff)) * FNV_PRIME;                                                 \
                h = (h ^ (word[w] >> 16 & 0xff)) * FNV_PRIME;                                                \
                h = (h ^ word[w] >> 24) * FNV_PRIME;                                                         \
            }                                                                                                \
            h = (h ^ word[3]) * FNV_PRIME;                                                                   \
            h ^= h >> 16;                                                                                    \
            h *= 0x85ebca6bu;                                                                                \
            h ^= h >> 13;                                                                                    \
            h *= 0xc2b2ae35u;                                                                                \
            h ^= h >> 16;                                                                                    \
            *(lanes *)(hashes + i) = h;                                                                      \
        }                                                                                                    \
    }

HASH_MANY(baseline, )
#if defined(__x86_64__)
HASH_MANY(avx2, __attribute__((target("avx2"))))
HASH_MANY(avx512, __attribute__((target("avx512f,prefer-vector-width=512"))))
#endif

void flow_hasher_fnv(struct flow_hasher *hasher)
{
    *hasher = (struct flow_hasher){.many = hash_many_baseline, .name = "baseline"};
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f")) {
        hasher->name = "avx512";
        hasher->many = hash_many_avx512;
    } else if (__builtin_cpu_supports("avx2")) {
        hasher->name = "avx2";
        hasher->many = hash_many_avx2;
    }
#endif
}

#if defined(__x86_64__)
/* Four rounds: any difference of two keys has spread over the whole block, and which one makes the low bits
 * alike depends on round keys that never leave the process. */
#define AES __attribute__((target("aes,sse4.2")))
AES static inline uint32_t aes_of(const __m128i key[5], uint64_t addrs, uint32_t ports, uint8_t protocol)
{
    __m128i block = _mm_set_epi64x((int64_t)(ports | (uint64_t)protocol << 32), (int64_t)addrs);
    block = _mm_xor_si128(block, key[0]);
    for (unsigned i = 1; i < 5; i++)
        block = _mm_aesenc_si128(block, key[i]);
    return (uint32_t)_mm_cvtsi128_si32(block);
}

AES static void load_key(const struct flow_hasher *hasher, __m128i key[5])
{
    for (unsigned i = 0; i < 5; i++)
        key[i] = _mm_load_si128((const __m128i *)hasher->key + i);
}

AES static uint32_t hash_one_aes(const struct flow_hasher *hasher, uint64_t addrs, uint32_t ports,
                                 uint8_t protocol)
{
    __m128i key[5];
    load_key(hasher, key);
    return aes_of(key, addrs, ports, protocol);
}

AES static void hash_many_aes(const struct flow_hasher *hasher, const uint64_t *addrs, const uint32_t *ports,
                              const uint8_t *protocols, uint32_t *hashes, unsigned n)
{
    __m128i key[5];
    load_key(hasher, key);
    for (unsigned i = 0; i < n; i++)
        hashes[i] = aes_of(key, addrs[i], ports[i], protocols[i]);
}

bool flow_hasher_aes(struct flow_hasher *hasher, const uint32_t key[20])
{
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("aes"))
        return false;
    *hasher = (struct flow_hasher){.many = hash_many_aes, .one = hash_one_aes, .name = "aes"};
    memcpy(hasher->key, key, sizeof hasher->key);
    return true;
}
#else
bool flow_hasher_aes(struct flow_hasher *hasher, const uint32_t key[20])
{
    (void)hasher, (void)key;
    return false;
}
#endif
