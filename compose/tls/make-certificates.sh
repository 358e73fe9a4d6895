#!/bin/sh
# Makes an authority, and a certificate with its key for each service, in directories of their own.
#
#   make-certificates.sh AUTHORITY DIRECTORY=OWNER=ALTERNATIVE-NAMES...
#
# The directory AUTHORITY gets ca.key, which only this script needs. Each other DIRECTORY gets ca.crt, tls.crt and
# tls.key, and only OWNER (as user:group, by number) may read the key. Files that are good for 30 more days stay.
set -eu
umask 077

authority=$1
shift

is_good() { openssl x509 -in "$1" -noout -checkend 2592000 >/dev/null 2>&1; }

mkdir -p "$authority"
if ! is_good "$authority/ca.crt"; then
    openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -noenc -days 3650 \
        -subj "/CN=dynamo-redis CA" -addext "keyUsage=critical,keyCertSign,cRLSign" -keyout "$authority/ca.key" -out "$authority/ca.crt"
fi

for service; do
    place=${service%%=*}
    rest=${service#*=}
    name=$(basename "$place")
    mkdir -p "$place"
    if is_good "$place/tls.crt" && cmp -s "$authority/ca.crt" "$place/ca.crt"; then
        continue
    fi
    rm -f "$place"/new.*
    openssl req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -noenc -subj "/CN=$name" \
        -keyout "$place/new.key" -out "$authority/$name.csr"
    printf '%s\n' "subjectAltName=${rest#*=}" extendedKeyUsage=serverAuth,clientAuth \
        basicConstraints=critical,CA:FALSE authorityKeyIdentifier=keyid >"$authority/$name.ext"
    openssl x509 -req -in "$authority/$name.csr" -CA "$authority/ca.crt" -CAkey "$authority/ca.key" \
        -days 90 -extfile "$authority/$name.ext" -out "$place/new.crt"
    cp "$authority/ca.crt" "$place/new.ca"
    chmod 444 "$place/new.crt" "$place/new.ca"
    chmod 400 "$place/new.key"
    if [ "$(id -u)" = 0 ]; then
        chown "${rest%%=*}" "$place"/new.*
    fi
    mv -f "$place/new.key" "$place/tls.key"
    mv -f "$place/new.crt" "$place/tls.crt"
    mv -f "$place/new.ca" "$place/ca.crt"
done
