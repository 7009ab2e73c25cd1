//! openGauss's log-in by SHA256 (auth.cpp `sendAuthRequest`, fe-auth.cpp `pg_password_sendauth`, sha2.cpp
//! `pg_sha256_encrypt`, all of openGauss 5.0.0).
//!
//! ```text
//! R, code 10, method 2, salt (64 hex digits), token (8), then
//!     by protocol 3.0:  the server's signature (64 hex digits), no number of rounds
//!     by protocol 3.51: the number of rounds (4 bytes)
//! k          = PBKDF2-HMAC-SHA1(password, salt, rounds), 32 bytes
//! server key = HMAC-SHA256(k, "Sever Key"), client key = HMAC-SHA256(k, "Client Key")
//! signature  = HMAC-SHA256(server key, token)
//! answer     = hex(HMAC-SHA256(SHA256(client key), token) XOR client key)
//! ```

use hmac::{Hmac, KeyInit as _, Mac as _};
use sha1::Sha1;
use sha2::{Digest as _, Sha256};

use super::frame::Frame;

/// More rounds than this a server does not store (sha2.h, `MAX_ITERATION_COUNT`): several seconds of arithmetic.
const MOST_ROUNDS: u32 = 10_000_000;
const SALT: usize = 32;
const TOKEN: usize = 4;
const KEY: usize = 32;

/// What the server asks.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Asked {
    salt: [u8; SALT],
    token: [u8; TOKEN],
    known: Known,
}

/// What else it says.
#[derive(Debug, PartialEq, Eq)]
enum Known {
    /// It knows the password: 3.0.
    Signature([u8; KEY]),
    /// How many rounds: 3.51.
    Rounds(u32),
}

/// Why it cannot be answered.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Problem {
    /// It is not as openGauss sends it.
    Damaged(&'static str),
    /// Another of its methods.
    Unsupported(&'static str),
}

impl Asked {
    /// Reads a server's first answer; `None`: it is none of openGauss's own questions.
    pub(super) fn of(frame: &Frame) -> Option<Result<Self, Problem>> {
        if frame.kind != b'R' {
            return None;
        }
        let (code, body) = frame.body.split_first_chunk::<4>()?;
        match u32::from_be_bytes(*code) {
            // PostgreSQL's SASL has a list of names here, which are not empty; openGauss a small number.
            10 if body.first() == Some(&0) && body.len() > 4 => Some(Self::read(body)),
            // Never a first question of PostgreSQL (continuation and end of SASL).
            11 => Some(Err(Problem::Unsupported("md5 of a sha256"))),
            12 => Some(Err(Problem::Unsupported("sha256 by RFC 5802"))),
            13 => Some(Err(Problem::Unsupported("sm3"))),
            14 => Some(Err(Problem::Unsupported("iam"))),
            _ => None,
        }
    }

    fn read(body: &[u8]) -> Result<Self, Problem> {
        let short = Problem::Damaged("the question is cut short");
        let Some((method, body)) = body.split_first_chunk::<4>() else {
            return Err(short);
        };
        // sha2.h: 2 is SHA256_PASSWORD.
        if u32::from_be_bytes(*method) != 2 {
            return Err(Problem::Unsupported(
                "sha256 with a password stored otherwise",
            ));
        }
        let Some((salt, body)) = body.split_first_chunk::<{ 2 * SALT }>() else {
            return Err(short);
        };
        let Some((token, rest)) = body.split_first_chunk::<{ 2 * TOKEN }>() else {
            return Err(short);
        };
        let known = if let Ok(rounds) = <[u8; 4]>::try_from(rest) {
            match u32::from_be_bytes(rounds) {
                rounds @ 1..=MOST_ROUNDS => Known::Rounds(rounds),
                _ => return Err(Problem::Damaged("the number of rounds makes no sense")),
            }
        } else if let Ok(signature) = <[u8; 2 * KEY]>::try_from(rest) {
            Known::Signature(unhex(&signature)?)
        } else {
            return Err(Problem::Damaged("the question has a wrong length"));
        };
        Ok(Self {
            salt: unhex(salt)?,
            token: unhex(token)?,
            known,
        })
    }

    /// The answer; `None`: the server's signature is not made with this password in `usual` rounds.
    pub(super) fn answer(&self, password: &[u8], usual: u32) -> Option<String> {
        let rounds = match self.known {
            Known::Signature(_) => usual,
            Known::Rounds(rounds) => rounds,
        };
        let k: [u8; KEY] = pbkdf2::pbkdf2_hmac_array::<Sha1, KEY>(password, &self.salt, rounds);
        if let Known::Signature(signature) = self.known {
            // "Sever" is how openGauss spells it.
            let server_key = hmac(&k, b"Sever Key");
            if hmac(&server_key, &self.token) != signature {
                return None;
            }
        }
        let client_key = hmac(&k, b"Client Key");
        let stored_key: [u8; KEY] = Sha256::digest(client_key).into();
        let mut answer = hmac(&stored_key, &self.token);
        for (byte, key) in answer.iter_mut().zip(client_key) {
            *byte ^= key;
        }
        Some(hex::encode(answer))
    }
}

fn hmac(key: &[u8; KEY], text: &[u8]) -> [u8; KEY] {
    // A key of 32 bytes is shorter than the hash's block: it is taken as it is.
    let mut block = [0; 64];
    block[..KEY].copy_from_slice(key);
    let mut mac = Hmac::<Sha256>::new(&block.into());
    mac.update(text);
    mac.finalize().into_bytes().into()
}

fn unhex<const N: usize>(text: &[u8]) -> Result<[u8; N], Problem> {
    let mut bytes = [0; N];
    hex::decode_to_slice(text, &mut bytes)
        .map_err(|_| Problem::Damaged("salt, token or signature is no hexadecimal text"))?;
    Ok(bytes)
}
