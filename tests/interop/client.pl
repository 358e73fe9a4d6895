#!/usr/bin/perl
# A client of the tcp plane, written from docs/wire-protocol.md alone and with what Perl brings. It blocks, and
# has one stream at a time.
#
#     client.pl HOST PORT INSTANCE_ID SECRET_HEX
#
# Calls the endpoints that tests/interop/test_perl_client.py serves, and reports in TAP. Exits with 1 if anything
# is not as the page says, with 2 if it is refused.

use strict;
use warnings;
use Digest::SHA qw(hmac_sha256);
use IO::Socket::INET;
use Socket qw(IPPROTO_TCP TCP_NODELAY);

my ($host, $port, $instance, $secret) = @ARGV;
$secret = pack 'H*', $secret;

use constant {
    OPEN => 1, DATA => 2, BATCH => 3, THE_END => 4, LAST => 5, LAST_BATCH => 6, ERROR => 7, ACCEPT => 8, CREDIT => 9,
    CANCEL => 10, GOAWAY => 11, PING => 12, PONG => 13, OPEN_RAW => 14, DATA_RAW => 15, LAST_RAW => 16,
};
use constant { STOP => 1, KILL => 2, MSGPACK => 0, BINARY => 1, INLINE_BYTES => 65_536 };
my $WINDOW = 6;

my $socket = IO::Socket::INET->new(PeerAddr => $host, PeerPort => $port, Timeout => 5) or die "cannot connect: $@";
setsockopt $socket, IPPROTO_TCP, TCP_NODELAY, 1;
binmode $socket;
$SIG{ALRM} = sub { print "not ok - in time\n"; exit 1 };
alarm 30;

# ---------------------------------------------------------------- msgpack

sub nil { "\xc0" }

sub int_ {
    my ($n) = @_;
    return $n < 0x80 ? pack('C', $n) : $n < 2**32 ? pack('CN', 0xce, $n) : pack('CQ>', 0xcf, $n);
}
sub str { my ($s) = @_; return pack('Cn', 0xda, length $s) . $s }
sub bin { my ($s) = @_; return pack('CN', 0xc6, length $s) . $s }
sub array { return pack('Cn', 0xdc, scalar @_) . join '', @_ }
sub map_ { return pack('Cn', 0xde, @_ / 2) . join '', @_ }

# Reads one value from a function that gives so many bytes.
sub value {
    my ($take) = @_;
    my $c = ord $take->(1);
    return $c if $c < 0x80;
    return $c - 256 if $c >= 0xe0;
    return hash_($take, $c & 0x0f) if $c < 0x90;
    return list($take, $c & 0x0f) if $c < 0xa0;
    return $take->($c & 0x1f) if $c < 0xc0;
    return undef if $c == 0xc0;
    return $c == 0xc3 ? 1 : 0 if $c <= 0xc3;
    return $take->(sized($take, $c - 0xc4)) if $c <= 0xc6;
    return unpack 'f>', $take->(4) if $c == 0xca;
    return unpack 'd>', $take->(8) if $c == 0xcb;
    return sized($take, $c - 0xcc) if $c <= 0xcf;
    return unpack 'c', $take->(1) if $c == 0xd0;
    return unpack 's>', $take->(2) if $c == 0xd1;
    return unpack 'l>', $take->(4) if $c == 0xd2;
    return unpack 'q>', $take->(8) if $c == 0xd3;
    return $take->(sized($take, $c - 0xd9)) if $c >= 0xd9 && $c <= 0xdb;
    return list($take, sized($take, $c - 0xdb)) if $c >= 0xdc && $c <= 0xdd;
    return hash_($take, sized($take, $c - 0xdd)) if $c >= 0xde;
    die sprintf "extension 0x%02x", $c;
}

sub sized { my ($take, $power) = @_; return unpack((qw(C n N Q>))[$power], $take->(1 << $power)) }
sub list { my ($take, $n) = @_; return [map { value($take) } 1 .. $n] }
sub hash_ { my ($take, $n) = @_; return {map { my $key = value($take); ($key => value($take)) } 1 .. $n} }

sub from_bytes {
    my ($bytes) = @_;
    my $at = 0;
    return value(sub { my ($n) = @_; $at += $n; return substr $bytes, $at - $n, $n });
}

# ---------------------------------------------------------------- the socket

sub take {
    my ($wanted) = @_;
    my $bytes = '';
    while (length $bytes < $wanted) {
        read($socket, $bytes, $wanted - length $bytes, length $bytes) or die "the connection ended\n";
    }
    return $bytes;
}

sub say_ { my $bytes = join '', @_; syswrite($socket, $bytes) == length $bytes or die "cannot write: $!" }

# ---------------------------------------------------------------- handshake

sub message { my $body = array(@_); say_(pack('n', length $body), $body) }
sub heard { return from_bytes(take(unpack 'n', take(2))) }

sub shake_hands {
    open my $random, '<:raw', '/dev/urandom' or die $!;
    read $random, my $nonce, 32;
    message(str('DYNR'), int_(1), int_(0), int_($WINDOW), int_($instance), bin($nonce));
    my $hello = heard();
    if (@$hello == 4) {
        print "refused: $hello->[2]\n";
        exit 2;
    }
    my ($magic, $version, $features, $window, $answers, $their_nonce, $proof) = @$hello;
    die "not the instance" unless $magic eq 'DYNR' && $version == 1 && $answers == $instance;
    my $transcript = $nonce . $their_nonce . pack('nQ>N nQ>N Q>', 1, 0, $WINDOW, $version, $features, $window, $instance);
    my $difference = hmac_sha256("dynamo-redis tcp server\0$transcript", $secret) ^ $proof;
    if ($difference ne "\0" x 32) {
        print "refused: the server does not know the secret\n";
        exit 2;
    }
    message(bin(hmac_sha256("dynamo-redis tcp client\0$transcript", $secret)));
    return $window;
}

# ---------------------------------------------------------------- frames

my $last_id = 0;

sub send_frame { my ($kind, @fields) = @_; say_(array(int_($kind), @fields)) }

# The next frame about a stream, with the value of raw bytes in place of their size and encoding.
sub next_frame {
    while (1) {
        my $frame = value(\&take);
        my ($kind, $id) = @$frame;
        if ($kind == DATA_RAW || $kind == LAST_RAW) {
            my $bytes = take($frame->[2]);
            return [$kind, $id, $frame->[3] == BINARY ? $bytes : from_bytes($bytes)];
        }
        if ($kind == PING) { send_frame(PONG, int_(0), int_($frame->[2])) }
        elsif ($kind == GOAWAY) { die "GOAWAY $frame->[2]: $frame->[3]\n" }
        elsif ($kind & 0x40 || $kind == CREDIT && $id != $last_id) { next }
        else { return $frame }
    }
}

sub open_stream {
    my ($subject, $request, %options) = @_;
    my @head = (int_(++$last_id), str($subject), int_($options{stream} ? 1 : 0), $options{headers} // nil());
    if (length $request > INLINE_BYTES) {
        send_frame(OPEN_RAW, @head, int_(length $request), int_(MSGPACK));
        say_($request);
    } else {
        send_frame(OPEN, @head, $request);
    }
}

# Reads an answer to its end: its items, and the error if it ends with one. Calls `on_item` after each.
sub answer {
    my ($on_item) = @_;
    my ($taken, @items) = (0);
    while (1) {
        my ($kind, $id, @fields) = @{next_frame()};
        next if $id != $last_id || $kind == ACCEPT || $kind == CREDIT || $kind == PONG;
        return (\@items, \@fields) if $kind == ERROR;
        return (\@items) if $kind == THE_END;
        my @new = $kind == BATCH || $kind == LAST_BATCH ? @{$fields[0]} : ($fields[0]);
        push @items, @new;
        return (\@items) if $kind == LAST || $kind == LAST_BATCH || $kind == LAST_RAW;
        $on_item->(scalar @items) if $on_item;
        # A small item costs 1, a raw payload 1 more for each 64 KiB.
        $taken += $kind == DATA_RAW ? 1 + int(length($new[0]) / 65_536) : @new;
        if ($taken * 2 >= $WINDOW) {
            send_frame(CREDIT, int_($last_id), int_($taken));
            $taken = 0;
        }
    }
}

# ---------------------------------------------------------------- what is tried

my ($count, $failed) = (0, 0);

sub ok {
    my ($is, $name) = @_;
    $failed++ unless $is;
    printf "%s %d - %s\n", $is ? 'ok' : 'not ok', ++$count, $name;
}

my $their_window = shake_hands();
ok(1, 'handshake with a secret');

open_stream('echo', map_(str('n'), int_(2)));
my ($items, $error) = answer();
ok(@$items == 1 && $items->[0]{n} == 2, 'one request, one answer');

open_stream('count', int_(1000));
($items) = answer();
ok("@$items" eq join(' ', 0 .. 999), 'a stream of 1000 items, on a credit of 6');

my $large = "\x01" x 200_000;
open_stream('echo', bin($large));
($items) = answer();
ok($items->[0] eq $large, 'a large payload there and back');

open_stream('thrice', bin($large));
($items) = answer();
ok(@$items == 3 && $items->[2] eq $large, 'large payloads in a stream');

open_stream('nowhere', nil());
($items, $error) = answer();
ok($error->[0] eq 'endpoint_not_found', 'an endpoint that is not served');

open_stream('full', nil());
($items, $error) = answer();
ok($error->[0] eq 'overloaded' && $error->[2]{retry_after_ms} == 250, 'an error with details');

open_stream('fails', nil());
($items, $error) = answer();
ok("@$items" eq 'first' && $error->[0] eq 'invalid_request' && $error->[1] eq 'as told', 'an error after an item');

open_stream('wait', nil());
($items) = answer(sub { send_frame(CANCEL, int_($last_id), int_(STOP)) if $_[0] == 1 });
ok($items->[0] eq 'first' && $items->[-1] eq 'last words', 'a stop, and what is still said');

open_stream('hang', nil());
next_frame();
send_frame(CANCEL, int_($last_id), int_(KILL));
open_stream('killed', nil());
($items) = answer();
ok($items->[0] == 1, 'a kill, and the stream after it');

open_stream('hang', nil(), headers => map_(str('deadline_ms'), int_(50), str('id'), str('perl-1')));
($items, $error) = answer();
ok("@$items" eq 'first' && $error->[0] eq 'deadline_exceeded', 'a deadline');

open_stream('total', int_(1), stream => 1);
my $credit = $their_window;
for my $n (2 .. 40) {
    while ($credit <= 0) {
        my ($kind, $id, $more) = @{next_frame()};
        $credit += $more if $kind == CREDIT && $id == $last_id;
    }
    send_frame($n < 40 ? DATA : LAST, int_($last_id), int_($n));
    $credit--;
}
($items) = answer();
ok($items->[0] == 820, "a request stream of 40 messages, on a credit of $their_window");

say_(array(int_(0x40), int_(0), nil()));
send_frame(PING, int_(0), int_(4_000_000_000));
my $pong = next_frame();
ok($pong->[0] == PONG && $pong->[2] == 4_000_000_000, 'a frame that may be skipped, and a PING');

print "1..$count\n";
exit($failed ? 1 : 0);
