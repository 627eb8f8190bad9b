# SPDX-License-Identifier: Apache-2.0
# swkvm: build, run, test, benchmark. `make help` lists the targets.

SHELL := /bin/bash
.DEFAULT_GOAL := all

# The guest's ELF file and swkvm's binary.
GUEST  := guests/kernel/build/guest.elf
BINARY := build/swkvm

SWIFT  ?= swift
# A static binary: it needs no Swift or C library at run time. For reproducible builds it refers to its sources without their directory, the order of
# the libraries, which SwiftPM takes from a hash table, is fixed, and strip removes hashes of the compiler's arguments and of the debug information,
# which still depend on that directory. `make reproducible` checks that one commit gives one binary.
# Each function has a section of its own: the linker drops those that are not used, and puts those of a start and of a running machine next to each
# other (Sources/order.txt, `make order`). ESSENTIALS is a module in the place of the toolchain's FoundationEssentials.
ESSENTIALS := build/essentials/FoundationEssentials
FUNCTIONS  := -Xswiftc -Xfrontend -Xswiftc -function-sections
STATIC  := -c release --static-swift-stdlib -Xswiftc -static-executable -Xswiftc -use-ld=lld -Xlinker --gc-sections -Xlinker -z -Xlinker now \
	-Xswiftc -file-prefix-map -Xswiftc $(CURDIR)=. -Xcc -ffile-prefix-map=$(CURDIR)=. $(FUNCTIONS)
# `make release TLS=yes` supports remote disks over TLS, and adds 3 MB.
ifeq ($(TLS),yes)
STATIC  += -Xcc -DSWKVM_STATIC_TLS $(addprefix -Xlinker -l,gnutls hogweed nettle gmp tasn1 idn2 unistring)
TLS_PACKAGES := libgnutls28-dev nettle-dev libgmp-dev libtasn1-6-dev libidn2-dev libunistring-dev
endif
# Lists the linked archives and the reason for each: a test compares the list of packages with it.
RELEASE := $(STATIC) -Xlinker --why-extract=$(CURDIR)/build/generated/extracted.txt -Xlinker -T$(CURDIR)/Sources/sections.ld \
	-Xlinker --symbol-ordering-file=$(CURDIR)/Sources/order.txt -Xlinker --no-warn-symbol-ordering \
	-Xswiftc -I$(CURDIR)/$(dir $(ESSENTIALS)) -Xlinker $(CURDIR)/$(ESSENTIALS).o --product swkvm
# The bench reads JSON, for which it needs the toolchain's FoundationEssentials: other options, and so a build directory of its own.
BENCH   := $(STATIC) --scratch-path .build/bench --product swkvm-bench

# Debian packages, by use. Either of gdb's two packages will do; they cannot be installed together.
GDB            := $(if $(shell command -v gdb),,gdb-minimal)
BUILD_PACKAGES := liburing-dev zlib1g-dev libzstd-dev libnbd-dev libssl-dev libexpat1-dev libjansson-dev $(TLS_PACKAGES)
RUN_PACKAGES   := qemu-utils iproute2 iputils-ping
TEST_PACKAGES  := bash-completion zsh mandoc groff man-db qemu-system-x86 qemu-utils mount nbdkit gnutls-bin iproute2 iputils-ping passt dnsmasq-base nftables procps openvswitch-switch acpica-tools dmidecode prometheus e2fsprogs dosfstools mtools fdisk seabios virtinst libvirt-clients libvirt0 corosync pacemaker pacemaker-cli-utils resource-agents libxml2-utils $(GDB)
LINT_PACKAGES  := shellcheck
TRIAL_PACKAGES := lintian systemd
LAB_PACKAGES   := qemu-system-x86 qemu-utils e2fsprogs dmsetup lz4 xz-utils $(GDB)
VTX_PACKAGES   := bochs bochs-term bochsbios vgabios isolinux syslinux-common xorriso e2fsprogs
BENCH_PACKAGES := qemu-system-x86 qemu-utils fio gcc libc6-dev util-linux

.PHONY: all guest release order sbom check-updates run test test-all lint format fuzz fuzz-corpus tsan lab lab-smp lab-vtx bench bench-compare man completions install uninstall deb deb-trial reproducible clean help
.PHONY: packages-build packages-run packages-test packages-lab packages-lab-vtx packages-bench packages-lint packages-trial

all: release man ## builds the static binary build/swkvm, man pages, completions and the list of packages

help: ## shows this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 24

guest: packages-build ## builds the bundled guest kernel
	@$(MAKE) --no-print-directory -C guests/kernel

$(ESSENTIALS).o: Sources/FoundationEssentials/FoundationEssentials.swift Makefile
	@mkdir -p $(@D)
	@$(SWIFT)c -swift-version 6 -O -wmo -parse-as-library -module-name $(notdir $(ESSENTIALS)) -file-prefix-map $(CURDIR)=. \
		-Xfrontend -function-sections -avoid-emit-module-source-info -emit-module -emit-module-path $(ESSENTIALS).swiftmodule -emit-object -o $@ $<

# The assembler includes the guest in the binary, but SwiftPM does not know this dependency: a newer guest touches the source file. Nor does it know
# the linker's other files: newer ones have it link again.
release: guest $(ESSENTIALS).o ## builds the static binary build/swkvm
	@if [ $(GUEST) -nt Sources/BundledGuest/guest.S ]; then touch Sources/BundledGuest/guest.S; fi
	@.ci/components $(TLS)
	@binary="$$($(SWIFT) build $(RELEASE) --show-bin-path)/swkvm"; for file in build/generated/extracted.txt Sources/order.txt Sources/sections.ld $(ESSENTIALS).o; do \
		if [ ! -e $$file ] || { [ $$file != build/generated/extracted.txt ] && [ $$file -nt "$$binary" ]; }; then rm -f "$$binary"; fi; done
	SWIFT_DETERMINISTIC_HASHING=1 $(SWIFT) build $(RELEASE)
	@SWIFT="$(SWIFT)" .ci/strip "$$($(SWIFT) build $(RELEASE) --show-bin-path)/swkvm" $(BINARY)
	@ls -l $(BINARY) | awk '{print $$NF ": " $$5 " bytes, stripped and static"}'
	@.ci/sbom

order: release ## records the functions of a running machine in Sources/order.txt, for the next release (needs root and /dev/kvm)
	@.ci/order "$$($(SWIFT) build $(RELEASE) --show-bin-path)/swkvm"

sbom: release ## writes build/swkvm.spdx.json: the packages in build/swkvm, with versions and licences (SPDX 2.3)
	@echo build/swkvm.spdx.json

check-updates: ## reports newer versions in Debian of the libraries in build/swkvm (SBOM=FILE: of another binary); status 2 then
	@.ci/check-updates $(SBOM)

run: release packages-run ## boots the bundled guest with 2 GiB in huge pages, a qcow2 disk and a TAP on a bridge
	@guests/run

test: packages-build packages-test packages-lab packages-lab-vtx ## builds the release and runs all tests (ARGS='--filter NAME' for some)
	@.ci/test

test-all: ## runs every test with all of its generated cases, and every lab case: some hours
	@$(MAKE) --no-print-directory test ALL=yes

lint: packages-lint ## checks licence headers, `swift format lint --strict`, shellcheck (ARGS: some of licences, format, shell)
	@.ci/lint $(ARGS)

format: ## formats the Swift files (ARGS: paths; by default all that .ci/unformatted does not list)
	@.ci/lint rewrite $(ARGS)

fuzz: packages-build ## fuzzes the parsers of untrusted bytes with libFuzzer, SECONDS (60) for each of TARGETS (all)
	@FUZZ_SECONDS=$(or $(SECONDS),60) .ci/fuzz $(TARGETS)

fuzz-corpus: packages-build ## adds the inputs with the most coverage that fuzzing found to Tests/Fuzz/Corpus (TARGETS)
	@.ci/fuzz merge $(TARGETS)

tsan: guest packages-test ## runs the tests of code that threads share with ThreadSanitizer (ARGS='--filter …' and SWKVM_TESTS for others)
	@.ci/tsan

lab: release packages-lab ## boots stock Linux guests on an emulated AMD-V host (ARGS: cases; shell for a shell there; compare to compare with QEMU)
	@WORDS="$(WORDS)" Tests/Lab/run $(if $(filter compare,$(ARGS)),compare,amdv $(or $(ARGS),all))

lab-smp: release packages-lab ## does the same on an emulated AMD-V host with two CPUs, XSAVE and AVX
	@WORDS="$(WORDS)" Tests/Lab/run smp $(or $(ARGS),all)

lab-vtx: release packages-lab-vtx ## does the same on an emulated VT-x host
	@WORDS="$(WORDS)" Tests/Lab/run vtx $(or $(ARGS),all)

bench: release packages-bench ## runs the benchmarks: swkvm, QEMU, fio and minimal C programs (BENCH_LINUX=vmlinux adds Linux)
	$(SWIFT) build $(BENCH)
	@Tests/Bench/run "$$($(SWIFT) build $(BENCH) --show-bin-path)/swkvm-bench"

bench-compare: packages-bench ## compares two results, or two commits: OLD=… NEW=…, files of BENCH_JSON=FILE, tables or commits
	$(SWIFT) build $(BENCH)
	@Tests/Bench/compare "$$($(SWIFT) build $(BENCH) --show-bin-path)/swkvm-bench" "$(OLD)" "$(NEW)"

man: release ## builds the man pages and shell completions in build/man and build/completions
	@.ci/man

# Installs existing files: root's PATH may have no Swift, and a build as root would leave files owned by root.
install: ## installs the built files into PREFIX (/usr/local), below DESTDIR if set; builds nothing
	@.ci/install "$(or $(PREFIX),/usr/local)" "$(DESTDIR)"

uninstall: ## removes what `make install` with the same PREFIX and DESTDIR installed
	@.ci/install --remove "$(or $(PREFIX),/usr/local)" "$(DESTDIR)"

deb: all ## builds a Debian package in build/, for `apt install ./build/swkvm_….deb`
	@.ci/deb

deb-trial: deb packages-trial ## installs, runs and purges that package on a copy-on-write view of this system; needs root
	@.ci/deb-trial

reproducible: packages-build ## builds this commit in two directories and compares all products byte by byte
	@.ci/reproducible

clean: ## removes all built files
	rm -rf .build build guests/kernel/build

packages-build: ; @.ci/packages $(BUILD_PACKAGES)
packages-run: ; @.ci/packages $(RUN_PACKAGES)
packages-test: ; @.ci/packages $(TEST_PACKAGES)
packages-lab: ; @.ci/packages $(LAB_PACKAGES)
packages-lab-vtx: ; @.ci/packages $(VTX_PACKAGES)
packages-trial: ; @.ci/packages $(TRIAL_PACKAGES)
packages-lint: ; @.ci/packages $(LINT_PACKAGES)
packages-bench: ; @.ci/packages $(BENCH_PACKAGES)
