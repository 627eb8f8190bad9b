# SPDX-License-Identifier: Apache-2.0
# swkvm: build, run, test, measure. `make help` lists what there is.

SHELL := /bin/bash
.DEFAULT_GOAL := all

# Where the guest's ELF and swkvm's binary come from.
GUEST  := guests/kernel/build/guest.elf
BINARY := build/swkvm

SWIFT  ?= swift
# A static binary: no Swift or C library is needed where it runs.
STATIC  := -c release --static-swift-stdlib -Xswiftc -static-executable -Xswiftc -use-ld=lld -Xlinker --gc-sections
# `make release TLS=yes`: 3 MB more, for remote disks over TLS.
ifeq ($(TLS),yes)
STATIC  += -Xcc -DSWKVM_STATIC_TLS $(addprefix -Xlinker -l,gnutls hogweed nettle gmp tasn1 idn2 unistring)
TLS_PACKAGES := libgnutls28-dev nettle-dev libgmp-dev libtasn1-6-dev libidn2-dev libunistring-dev
endif
RELEASE := $(STATIC) --product swkvm
BENCH   := $(STATIC) --product swkvm-bench

# Debian packages, by what needs them. Both packages of gdb do, but not beside each other.
GDB            := $(if $(shell command -v gdb),,gdb-minimal)
BUILD_PACKAGES := liburing-dev zlib1g-dev libzstd-dev libnbd-dev libssl-dev $(TLS_PACKAGES)
RUN_PACKAGES   := qemu-utils iproute2 iputils-ping
TEST_PACKAGES  := bash-completion zsh mandoc groff man-db qemu-system-x86 qemu-utils mount nbdkit gnutls-bin iproute2 iputils-ping openvswitch-switch acpica-tools dmidecode $(GDB)
LINT_PACKAGES  := shellcheck
LAB_PACKAGES   := qemu-system-x86 qemu-utils e2fsprogs dmsetup lz4 xz-utils $(GDB)
VTX_PACKAGES   := bochs bochs-term bochsbios vgabios isolinux syslinux-common xorriso e2fsprogs
BENCH_PACKAGES := qemu-system-x86 qemu-utils fio gcc libc6-dev util-linux

.PHONY: all guest release run test lint fuzz fuzz-corpus tsan lab lab-smp lab-vtx bench man completions install clean help
.PHONY: packages-build packages-run packages-test packages-lab packages-lab-vtx packages-bench packages-lint

all: release man ## the static binary build/swkvm, its man pages and completions

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 24

guest: packages-build ## the bundled guest kernel
	@$(MAKE) --no-print-directory -C guests/kernel

# The assembler puts the guest into the binary, and SwiftPM does not know of it: a newer guest makes its source newer.
release: guest ## the static binary build/swkvm
	@if [ $(GUEST) -nt Sources/BundledGuest/guest.S ]; then touch Sources/BundledGuest/guest.S; fi
	$(SWIFT) build $(RELEASE)
	@mkdir -p build
	@strip -o $(BINARY).new "$$($(SWIFT) build $(RELEASE) --show-bin-path)/swkvm" && mv $(BINARY).new $(BINARY)
	@ls -l $(BINARY) | awk '{print $$NF ": " $$5 " bytes, stripped and static"}'

run: release packages-run ## boots the bundled guest with 2 GiB in huge pages, a qcow2 disk and a TAP on a bridge
	@guests/run

test: release packages-test packages-lab packages-lab-vtx ## every test
	@.ci/test

lint: packages-lint ## licence headers, `swift format lint --strict`, shellcheck (ARGS: some of licences, format, shell)
	@.ci/lint $(ARGS)

fuzz: packages-build ## libFuzzer on what reads untrusted bytes, SECONDS (60) for each of TARGETS (all)
	@FUZZ_SECONDS=$(or $(SECONDS),60) .ci/fuzz $(TARGETS)

fuzz-corpus: packages-build ## takes into Tests/Fuzz/Corpus what fuzzing has found, the few inputs that reach most (TARGETS)
	@.ci/fuzz merge $(TARGETS)

tsan: packages-build packages-test ## the tests in which threads meet, with ThreadSanitizer (ARGS='--filter …' for others, of SWKVM_TESTS)
	@.ci/tsan

lab: release packages-lab ## stock Linux guests on an emulated AMD-V host (ARGS: cases, shell for a shell there, compare for a comparison with QEMU)
	@WORDS="$(WORDS)" Tests/Lab/run $(if $(filter compare,$(ARGS)),compare,amdv $(or $(ARGS),all))

lab-smp: release packages-lab ## the same on an emulated AMD-V host with two CPUs, XSAVE and AVX
	@WORDS="$(WORDS)" Tests/Lab/run smp $(or $(ARGS),all)

lab-vtx: release packages-lab-vtx ## the same on an emulated VT-x host
	@WORDS="$(WORDS)" Tests/Lab/run vtx $(or $(ARGS),all)

bench: release packages-bench ## measures, beside QEMU, fio and minimal C programs (BENCH_LINUX=vmlinux adds Linux)
	$(SWIFT) build $(BENCH)
	@Tests/Bench/run "$$($(SWIFT) build $(BENCH) --show-bin-path)/swkvm-bench"

man: release ## the man pages and shell completions, build/man and build/completions
	@.ci/man

install: all ## into PREFIX (/usr/local)
	install -D -m 755 $(BINARY) $(DESTDIR)$(or $(PREFIX),/usr/local)/bin/swkvm
	install -d $(DESTDIR)$(or $(PREFIX),/usr/local)/share/man/man1
	install -m 644 build/man/*.1 $(DESTDIR)$(or $(PREFIX),/usr/local)/share/man/man1
	install -D -m 644 build/completions/swkvm.bash $(DESTDIR)$(or $(PREFIX),/usr/local)/share/bash-completion/completions/swkvm
	install -D -m 644 build/completions/swkvm.zsh $(DESTDIR)$(or $(PREFIX),/usr/local)/share/zsh/site-functions/_swkvm
	install -D -m 644 build/completions/swkvm.fish $(DESTDIR)$(or $(PREFIX),/usr/local)/share/fish/vendor_completions.d/swkvm.fish

clean: ## removes what was built
	rm -rf .build build guests/kernel/build

packages-build: ; @.ci/packages $(BUILD_PACKAGES)
packages-run: ; @.ci/packages $(RUN_PACKAGES)
packages-test: ; @.ci/packages $(TEST_PACKAGES)
packages-lab: ; @.ci/packages $(LAB_PACKAGES)
packages-lab-vtx: ; @.ci/packages $(VTX_PACKAGES)
packages-lint: ; @.ci/packages $(LINT_PACKAGES)
packages-bench: ; @.ci/packages $(BENCH_PACKAGES)
