// SPDX-License-Identifier: Apache-2.0
// What a static binary leaves out of the libraries that libnbd's archive names. None of it is ever called: addresses are
// read by DiskImage and not by libxml2, a TLS session is refused before there is one (cnbd_has_tls), and no PKCS#11 module is loaded.
//
// The symbols are hidden. Where libnbd is a shared library, it and its own libraries have the true ones and do not see these.

#include "CNBD.h"
#include <stddef.h>
#include <sys/auxv.h>

#define ABSENT(name) \
    __attribute__((visibility("hidden"))) void *name(void); \
    void *name(void) { return NULL; }

// libxml2: nbd_connect_uri, nbd_get_uri.
ABSENT(xmlFreeURI) ABSENT(xmlParseURI) ABSENT(xmlSaveUri) ABSENT(xmlURIUnescapeString)

#ifdef SWKVM_STATIC_TLS
// p11-kit, which exists as a shared library only: certificates and keys are files.
ABSENT(p11_kit_config_option) ABSENT(p11_kit_message) ABSENT(p11_kit_module_finalize) ABSENT(p11_kit_module_get_flags)
ABSENT(p11_kit_module_get_name) ABSENT(p11_kit_module_load) ABSENT(p11_kit_module_release) ABSENT(p11_kit_modules_load)
ABSENT(p11_kit_pin_file_callback) ABSENT(p11_kit_pin_get_length) ABSENT(p11_kit_pin_get_value) ABSENT(p11_kit_pin_new_for_string)
ABSENT(p11_kit_pin_register_callback) ABSENT(p11_kit_pin_request) ABSENT(p11_kit_pin_unref) ABSENT(p11_kit_pin_unregister_callback)
ABSENT(p11_kit_space_strdup) ABSENT(p11_kit_space_strlen) ABSENT(p11_kit_strerror) ABSENT(p11_kit_uri_format) ABSENT(p11_kit_uri_free)
ABSENT(p11_kit_uri_get_attribute) ABSENT(p11_kit_uri_get_attributes) ABSENT(p11_kit_uri_get_module_info) ABSENT(p11_kit_uri_get_pin_source)
ABSENT(p11_kit_uri_get_pin_value) ABSENT(p11_kit_uri_get_token_info) ABSENT(p11_kit_uri_match_module_info)
ABSENT(p11_kit_uri_match_token_info) ABSENT(p11_kit_uri_new) ABSENT(p11_kit_uri_parse) ABSENT(p11_kit_uri_set_attribute)
#else
// GnuTLS, 3 MB of a static binary.
ABSENT(gnutls_bye) ABSENT(gnutls_certificate_allocate_credentials) ABSENT(gnutls_certificate_free_credentials)
ABSENT(gnutls_certificate_set_x509_crl_file) ABSENT(gnutls_certificate_set_x509_key_file) ABSENT(gnutls_certificate_set_x509_system_trust)
ABSENT(gnutls_certificate_set_x509_trust_file) ABSENT(gnutls_cipher_get) ABSENT(gnutls_cipher_get_key_size) ABSENT(gnutls_cipher_get_name)
ABSENT(gnutls_credentials_set) ABSENT(gnutls_deinit) ABSENT(gnutls_error_is_fatal) ABSENT(gnutls_handshake)
ABSENT(gnutls_handshake_get_last_in) ABSENT(gnutls_handshake_get_last_out) ABSENT(gnutls_handshake_set_timeout) ABSENT(gnutls_init)
ABSENT(gnutls_kx_get) ABSENT(gnutls_kx_get_name) ABSENT(gnutls_mac_get) ABSENT(gnutls_mac_get_key_size) ABSENT(gnutls_mac_get_name)
ABSENT(gnutls_priority_set_direct) ABSENT(gnutls_psk_allocate_client_credentials) ABSENT(gnutls_psk_free_client_credentials)
ABSENT(gnutls_psk_set_client_credentials) ABSENT(gnutls_record_check_pending) ABSENT(gnutls_record_get_direction)
ABSENT(gnutls_record_recv) ABSENT(gnutls_record_send) ABSENT(gnutls_server_name_set) ABSENT(gnutls_session_set_verify_cert)
ABSENT(gnutls_strerror) ABSENT(gnutls_transport_is_ktls_enabled) ABSENT(gnutls_transport_set_int2)
#endif

bool cnbd_has_tls(void) {
#ifdef SWKVM_STATIC_TLS
    return true;
#else
    // A program without an interpreter has no shared libraries.
    return getauxval(AT_BASE) != 0;
#endif
}
