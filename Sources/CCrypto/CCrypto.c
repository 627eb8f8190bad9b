// SPDX-License-Identifier: Apache-2.0

#include "CCrypto.h"
#include <string.h>

// libcrypto's AES by the processor's instructions, which its interface offers behind EVP only. EVP cannot be linked partly: with it come providers,
// certificates and every other algorithm. The names are those of OpenSSL 1.0 to 3 (crypto/aes/asm/aesni-x86_64.pl); where one is missing nothing links.
int aesni_set_encrypt_key(const unsigned char *key, int bits, AES_KEY *schedule);
int aesni_set_decrypt_key(const unsigned char *key, int bits, AES_KEY *schedule);
void aesni_encrypt(const unsigned char *input, unsigned char *output, const AES_KEY *schedule);
void aesni_decrypt(const unsigned char *input, unsigned char *output, const AES_KEY *schedule);
void aesni_cbc_encrypt(const unsigned char *input, unsigned char *output, size_t count, const AES_KEY *schedule, unsigned char *iv, int encrypts);
void aesni_xts_encrypt(
    const unsigned char *input, unsigned char *output, size_t count, const AES_KEY *data, const AES_KEY *tweak, const unsigned char iv[16]);
void aesni_xts_decrypt(
    const unsigned char *input, unsigned char *output, size_t count, const AES_KEY *data, const AES_KEY *tweak, const unsigned char iv[16]);

bool ccrypto_has_aes(void) { return __builtin_cpu_supports("aes") && __builtin_cpu_supports("ssse3"); }

bool ccrypto_aes_prepare(struct ccrypto_aes *aes, const uint8_t *key, int bits, bool uses_instructions) {
    // The two have different forms of a prepared key.
    aes->uses_instructions = uses_instructions;
    if (uses_instructions) {
        return aesni_set_encrypt_key(key, bits, &aes->encrypting) == 0 && aesni_set_decrypt_key(key, bits, &aes->decrypting) == 0;
    }
    return AES_set_encrypt_key(key, bits, &aes->encrypting) == 0 && AES_set_decrypt_key(key, bits, &aes->decrypting) == 0;
}

void ccrypto_aes_encrypt(const struct ccrypto_aes *aes, const uint8_t *input, uint8_t *output) {
    if (aes->uses_instructions) aesni_encrypt(input, output, &aes->encrypting);
    else AES_encrypt(input, output, &aes->encrypting);
}

void ccrypto_aes_decrypt(const struct ccrypto_aes *aes, const uint8_t *input, uint8_t *output) {
    if (aes->uses_instructions) aesni_decrypt(input, output, &aes->decrypting);
    else AES_decrypt(input, output, &aes->decrypting);
}

// XTS block by block, for processors without the instructions.
static void xts_by_blocks(
    const struct ccrypto_aes *data, const struct ccrypto_aes *tweak, const uint8_t iv[16], const uint8_t *input, uint8_t *output, size_t count, bool encrypts
) {
    union {
        uint8_t bytes[16];
        uint64_t words[2];
    } mask, block;
    ccrypto_aes_encrypt(tweak, iv, mask.bytes);
    for (size_t done = 0; done < count; done += 16) {
        memcpy(block.bytes, input + done, 16);
        block.words[0] ^= mask.words[0];
        block.words[1] ^= mask.words[1];
        if (encrypts) ccrypto_aes_encrypt(data, block.bytes, block.bytes);
        else ccrypto_aes_decrypt(data, block.bytes, block.bytes);
        block.words[0] ^= mask.words[0];
        block.words[1] ^= mask.words[1];
        memcpy(output + done, block.bytes, 16);
        // Times x in GF(2^128), least significant byte first (IEEE 1619 §5.2).
        uint64_t carry = mask.words[1] >> 63;
        mask.words[1] = mask.words[1] << 1 | mask.words[0] >> 63;
        mask.words[0] = mask.words[0] << 1 ^ (carry ? 0x87 : 0);
    }
}

void ccrypto_xts(
    const struct ccrypto_aes *data, const struct ccrypto_aes *tweak, const uint8_t iv[16], const uint8_t *input, uint8_t *output, size_t count, bool encrypts
) {
    if (!data->uses_instructions) xts_by_blocks(data, tweak, iv, input, output, count, encrypts);
    else if (encrypts) aesni_xts_encrypt(input, output, count, &data->encrypting, &tweak->encrypting, iv);
    else aesni_xts_decrypt(input, output, count, &data->decrypting, &tweak->encrypting, iv);
}

void ccrypto_cbc(const struct ccrypto_aes *aes, const uint8_t iv[16], const uint8_t *input, uint8_t *output, size_t count, bool encrypts) {
    // It ends with another value.
    uint8_t vector[16];
    memcpy(vector, iv, 16);
    const AES_KEY *schedule = encrypts ? &aes->encrypting : &aes->decrypting;
    if (aes->uses_instructions) aesni_cbc_encrypt(input, output, count, schedule, vector, encrypts);
    else AES_cbc_encrypt(input, output, count, schedule, vector, encrypts);
}
