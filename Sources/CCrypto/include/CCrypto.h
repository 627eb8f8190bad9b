// SPDX-License-Identifier: Apache-2.0

#ifndef CCRYPTO_H
#define CCRYPTO_H

// The hash functions, whose own interface is taken: EVP's would bring 3.6 MB into a static binary.
#define OPENSSL_SUPPRESS_DEPRECATED
#if !__has_include(<openssl/aes.h>)
#error "OpenSSL is missing: `make packages-build` installs the libraries that swkvm is built with (Debian: libssl-dev)"
#endif
#include <openssl/aes.h>
#include <openssl/sha.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/// AES with one key, in libcrypto.
struct ccrypto_aes {
    AES_KEY encrypting;
    AES_KEY decrypting;
    bool uses_instructions;
};

/// Whether the processor has instructions for AES.
bool ccrypto_has_aes(void);

/// Takes a key of 128, 192 or 256 bits; returns whether it could.
bool ccrypto_aes_prepare(struct ccrypto_aes *aes, const uint8_t *key, int bits, bool uses_instructions);

/// One block of 16 bytes.
void ccrypto_aes_encrypt(const struct ccrypto_aes *aes, const uint8_t *input, uint8_t *output);
void ccrypto_aes_decrypt(const struct ccrypto_aes *aes, const uint8_t *input, uint8_t *output);

/// XTS (IEEE 1619) of `count` bytes, a multiple of 16; in place, or to other memory, which is only written.
void ccrypto_xts(
    const struct ccrypto_aes *data, const struct ccrypto_aes *tweak, const uint8_t iv[16], const uint8_t *input, uint8_t *output, size_t count, bool encrypts);

/// CBC of `count` bytes likewise.
void ccrypto_cbc(const struct ccrypto_aes *aes, const uint8_t iv[16], const uint8_t *input, uint8_t *output, size_t count, bool encrypts);

#endif
