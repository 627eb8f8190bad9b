// SPDX-License-Identifier: Apache-2.0

extension CompletionScript {
    /// What swkvm's script for bash has beside the parser's.
    static let bashFunctions = #"""
        # What swkvm adds: words as the shell cuts them, where readline cuts them at = and : too, and values with several
        # parts.

        # Sets REPLY to a word without its quotes.
        __swkvm_unquote() {
            local quote='' character
            local -i index
            REPLY=''
            for ((index = 0; index < ${#1}; index++)); do
                character="${1:index:1}"
                case "${quote}${character}" in
                "''" | '""') quote='' ;;
                "'" | '"') quote="${character}" ;;
                "\\" | '"\') index+=1; REPLY+="${1:index:1}" ;;
                *) REPLY+="${character}" ;;
                esac
            done
        }

        # Sets `head` to what readline replaces of the value, without `part` at its end, which is being completed.
        __swkvm_head() {
            head="${typed}"
            [[ -n "${1}" && "${typed}" = *"${1}" ]] && head="${typed%"${1}"}"
        }

        # Offers the files that begin with the first argument: -f, or -d for directories. In a list, commas are doubled.
        __swkvm_offer_files() {
            local head file unquoted="${1}"
            __swkvm_unquote "${typed}"
            head="${REPLY}"
            # A comma that was typed twice is one of the file's name.
            [[ "${head}" = *"${cur_part}" ]] && head="${head%"${cur_part}"}" || head=''
            is_offered=true
            while IFS='' read -r file; do
                # Readline knows no directory by a name with doubled commas.
                if [[ "${3}" = list && "${file}" = *,* && -d "${file}" ]]; then
                    file+=/
                    compopt -o nospace 2>/dev/null
                fi
                [[ "${3}" = list ]] && file="${file//,/,,}"
                COMPREPLY+=("${head}${file}")
            done < <(compgen "${2}" -- "${unquoted}")
        }

        # Offers those of the further arguments that begin with the first one, without a space behind a word that wants a
        # value.
        __swkvm_offer_words() {
            local part="${1}" word head
            __swkvm_head "${part}"
            is_offered=true
            shift
            compopt +o filenames 2>/dev/null
            local -a fitting=()
            for word in "${@}"; do
                [[ "${word}" = "${part}"* ]] && fitting+=("${word}")
            done
            [[ "${#fitting[@]}" -eq 1 && "${fitting[0]}" = *[=:] ]] && compopt -o nospace 2>/dev/null
            for word in "${fitting[@]}"; do COMPREPLY+=("${head}${word}"); done
        }

        # A value that is one of the arguments, or one of those with +@file, a colon and a path; @file is a path alone. What
        # stands behind -- are the keys of a list that may follow: see swkvm's ValueCompletion.one.
        __swkvm_word() {
            local token cur_part has_files=false is_list=''
            local -a words=() tokens=()
            while (($#)) && [[ "${1}" != -- ]]; do tokens+=("${1}"); shift; done
            if (($#)); then
                shift
                is_list=list
                if [[ "${cur//,,/}" = *,* ]]; then
                    __swkvm_list word "${@}"
                    return
                fi
            fi
            for token in "${tokens[@]}"; do
                if [[ "${token}" = @file ]]; then
                    has_files=true
                    continue
                elif [[ "${token}" = *+@file ]]; then
                    token="${token%+@file}:"
                    if [[ "${cur}" = "${token}"* ]]; then
                        cur_part="${cur#"${token}"}"
                        if [[ -n "${is_list}" ]]; then
                            __swkvm_offer_files "${cur_part//,,/,}" -f list
                        else
                            __swkvm_offer_files "${cur_part}" -f
                        fi
                        return
                    fi
                fi
                words+=("${token}")
            done
            __swkvm_offer_words "${cur}" "${words[@]}"
            if "${has_files}"; then
                compopt -o filenames 2>/dev/null
                cur_part="${cur}"
                __swkvm_offer_files "${cur}" -f
            fi
        }

        # A value with parts between commas: see swkvm's ValueCompletion.list.
        __swkvm_list() {
            local first="${1}" token key name item excluded cur_part
            local value="${cur//,,/$'\001'}"
            local -a given=() words=()
            shift
            if [[ "${first}" = file && "${value}" != *,* ]]; then
                cur_part="${cur}"
                __swkvm_offer_files "${cur//,,/,}" -f list
                return
            fi
            item="${value##*,}"
            [[ "${value}" = *,* ]] && IFS=, read -r -a given <<<"${value%,*}"
            [[ "${first}" = file ]] && given=("${given[@]:1}")
            for token in "${@}"; do
                key="${token#+}"
                excluded=''
                [[ "${key}" = *%* ]] && excluded="${key#*%}"
                key="${key%%%*}"
                name="${key%%=*}"
                if [[ "${item}" = *=* ]]; then
                    [[ "${name}" = "${item%%=*}" && "${key}" = *=* ]] || continue
                    cur_part="${item#*=}"
                    cur_part="${cur_part//$'\001'/,,}"
                    case "${key#*=}" in
                    '') is_offered=true ;;
                    @file) __swkvm_offer_files "${cur_part//,,/,}" -f list ;;
                    @dir) __swkvm_offer_files "${cur_part//,,/,}" -d list ;;
                    @tap) __swkvm_offer_links tun_flags ;;
                    @bridge) __swkvm_offer_links bridge ;;
                    *)
                        IFS=/ read -r -a words <<<"${key#*=}"
                        __swkvm_offer_words "${cur_part}" "${words[@]}"
                        ;;
                    esac
                    return
                fi
                __swkvm_is_free "${name}" "${token}" || continue
                [[ "${key}" = *=* ]] && name+='='
                words+=("${name}")
            done
            __swkvm_offer_words "${item}" "${words[@]}"
        }

        # Whether a key may be given beside those that are given.
        __swkvm_is_free() {
            local word
            for word in "${given[@]}"; do
                word="${word%%[=:]*}"
                [[ "${word}" = "${1}" && "${2}" != +* ]] && return 1
                [[ "/${excluded}/" = */"${word}"/* ]] && return 1
            done
            return 0
        }

        # Network interfaces that have such a file in /sys.
        __swkvm_offer_links() {
            local link
            local -a links=()
            for link in /sys/class/net/*/"${1}"; do
                link="${link%/*}"
                [[ -e "${link}" ]] && links+=("${link##*/}")
            done
            __swkvm_offer_words "${cur_part}" "${links[@]}"
        }

        # Takes words back that were offered.
        __swkvm_drop() {
            local word offered
            local -a kept=()
            for offered in "${COMPREPLY[@]}"; do
                for word in "${@}"; do
                    [[ "${offered}" = "${word}" ]] && continue 2
                done
                kept+=("${offered}")
            done
            COMPREPLY=("${kept[@]}")
        }

        __swkvm_complete() {
            local rest="${COMP_LINE:0:COMP_POINT}" trimmed word last="" typed="${2}" before
            local -a joined=() words=()
            local -i index
            for ((index = 0; index <= COMP_CWORD; index++)); do
                word="${COMP_WORDS[index]}"
                trimmed="${rest#"${rest%%[![:space:]]*}"}"
                # The word at the cursor ends there.
                ((index == COMP_CWORD)) && word="${trimmed}"
                if [[ "${index}" -gt 0 && "${trimmed}" = "${rest}" && -n "${word}" ]]; then
                    joined[${#joined[@]} - 1]+="${word}"
                else
                    joined+=("${word}")
                fi
                rest="${trimmed#"${word}"}"
            done
            for word in "${joined[@]}"; do
                # An option whose value was left out, as the next one shows.
                case "${word}:${last}" in
                -*:--hugepages | -*:--rng) unset "words[${#words[@]} - 1]" ;;
                esac
                last="${word}"
                if [[ "${word}" = --*=* ]]; then
                    words+=("${word%%=*}" "${word#*=}")
                else
                    words+=("${word}")
                fi
            done
            word="${words[${#words[@]} - 1]}"
            before="${word}"
            [[ -n "${typed}" ]] && before="${word%"${typed}"}"
            __swkvm_unquote "${before}"
            before="${REPLY}"
            __swkvm_unquote "${word}"

            COMP_WORDS=("${words[@]}")
            COMP_WORDS[${#words[@]} - 1]="${REPLY}"
            COMP_CWORD=$((${#words[@]} - 1))
            local is_offered=false prev="${words[${#words[@]} - 2]}"
            _swkvm "${1}" "${REPLY}" "${prev}"
            trap - RETURN
            # As qemu-img has it, which the parser's script does not know: -l FILE, -c NAME FILE …
            if [[ "${words[*]:1:2}" = 'image snapshot' && "${prev}" != -[acd] && "${word}" != -* ]]; then
                case " ${words[*]:3:COMP_CWORD - 3} " in
                *' -'[acdl]' '*) COMPREPLY=(); while IFS='' read -r word; do COMPREPLY+=("${word}"); done < <(compgen -f -- "${REPLY}") ;;
                esac
            fi
            # What is refused beside what is there.
            case " ${words[*]:1:2} : ${words[*]} " in
            *' image rebase : '*' -b '* | *' image rebase : '*' --backing '*) __swkvm_drop --no-backing ;;
            *' image rebase : '*' --no-backing '*) __swkvm_drop -b --backing ;;
            *' --iter-time '*) __swkvm_drop --iterations ;;
            *' --iterations '*) __swkvm_drop --iter-time ;;
            esac
            # Readline replaces only what is behind the last = or :.
            if ! "${is_offered}"; then
                for ((index = 0; index < ${#COMPREPLY[@]}; index++)); do
                    COMPREPLY[index]="${COMPREPLY[index]#"${before}"}"
                done
            fi
        }

        complete -o filenames -F __swkvm_complete swkvm
        """#

    /// The same for zsh.
    static let zshFunctions = #"""
        # What swkvm adds: values with several parts.

        # Offers files, or with -/ directories, for a part of a list, in which a comma is written twice.
        __swkvm_files() {
            local typed="${(Q)PREFIX//,,/,}"
            local -i before=compstate[nmatches]
            local -a names=(${~${(b)typed}}*(N)) directories others
            _files "$@" -F '(*,*)'
            names=(${(M)names:#*,*})
            directories=(${^names}(N/))
            others=(${^names}(N^/))
            directories=(${^${directories//,/,,}}/)
            others=(${others//,/,,})
            compadd -S '' -a directories
            [[ "$1" = -/ ]] || compadd -a others
            ((compstate[nmatches] > before))
        }

        # A value that is one of the arguments, or one of those with +@file, a colon and a path; @file is a path alone. What
        # stands behind -- are the keys of a list that may follow: see swkvm's ValueCompletion.one.
        __swkvm_word() {
            local token
            local -i end=${@[(i)--]} before=compstate[nmatches] has_files=0
            local -a words colons keys=("${@[end + 1,-1]}")
            if ((end < $#)) && [[ "${PREFIX//,,/}" = *,* ]]; then
                __swkvm_list word "${keys[@]}"
                return
            fi
            for token in "${@[1,end - 1]}"; do
                if [[ "${token}" = @file ]]; then
                    has_files=1
                elif [[ "${token}" = *+@file ]]; then
                    token="${token%+@file}:"
                    if [[ "${PREFIX}" = "${token}"* ]]; then
                        compset -P 1 '*:'
                        if ((end < $#)); then __swkvm_files; else _files; fi
                        return
                    fi
                    colons+=("${token}")
                else
                    words+=("${token}")
                fi
            done
            compadd -a words
            compadd -S '' -a colons
            ((has_files)) && _files
            ((compstate[nmatches] > before))
        }

        # A value with parts between commas: see swkvm's ValueCompletion.list.
        __swkvm_list() {
            # Doubled commas are none, and as long.
            local first="$1" token key name word excluded value="${PREFIX//,,/;;}"
            local -a given flags keys links
            shift
            if [[ "${first}" = file && "${value}" != *,* ]]; then
                __swkvm_files
                return
            fi
            if [[ "${value}" = *,* ]]; then
                given=("${(@s:,:)${value%,*}}")
                [[ "${first}" = file ]] && shift given
                compset -p $((${#${value%,*}} + 1))
            fi
            for token in "$@"; do
                key="${token#+}"
                excluded=''
                [[ "${key}" = *%* ]] && excluded="${key#*%}"
                key="${key%%%*}"
                name="${key%%=*}"
                if [[ "${PREFIX}" = *=* ]]; then
                    [[ "${name}" = "${PREFIX%%=*}" && "${key}" = *=* ]] || continue
                    compset -P 1 '*='
                    case "${key#*=}" in
                    '') _message "${name}" ;;
                    @file) __swkvm_files ;;
                    @dir) __swkvm_files -/ ;;
                    @tap)
                        links=(/sys/class/net/*/tun_flags(N:h:t))
                        compadd -a links
                        ;;
                    @bridge)
                        links=(/sys/class/net/*/bridge(N:h:t))
                        compadd -a links
                        ;;
                    *) compadd -- "${(@s:/:)${key#*=}}" ;;
                    esac
                    return
                fi
                for word in "${given[@]}"; do
                    word="${word%%[=:]*}"
                    [[ "${word}" = "${name}" && "${token}" != +* ]] && continue 2
                    [[ "/${excluded}/" = */"${word}"/* ]] && continue 2
                done
                if [[ "${key}" = *=* ]]; then keys+=("${name}="); else flags+=("${name}"); fi
            done
            compadd -a flags
            compadd -S '' -a keys
        }
        """#
}
