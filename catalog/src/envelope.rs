//! The envelope of every JSON object: `{"body":{...},"sha256":"..."}`.
//!
//! The hash is over the body's bytes as stored, and the bytes around the body are fixed, so that every
//! byte of the object counts: any change is found, white space and the case of a hex digit included.

use bytes::Bytes;
use pipeline::store::{Key, ObjectStore, StoreError};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use sha2::{Digest as _, Sha256};

use crate::error::CatalogError;
use crate::model::FORMAT;

const HEAD: &[u8] = b"{\"body\":";
const MIDDLE: &[u8] = b",\"sha256\":\"";
const TAIL: &[u8] = b"\"}";
const HEX_LEN: usize = 64;

/// Most stored bytes of a JSON object that is neither a manifest nor metadata: 1 MiB.
pub const OBJECT_LIMIT: usize = 1 << 20;
/// Most stored bytes of a manifest: 8 MiB. Decoded, hostile JSON takes about 16 times its size.
pub const MANIFEST_LIMIT: usize = 8 << 20;
/// Most stored bytes of a point's metadata: 32 MiB. A proxy takes no more than some of them back within a minute.
pub const METADATA_LIMIT: usize = 32 << 20;

/// An object as it is stored.
#[derive(Debug, Clone)]
pub struct Sealed {
    /// The stored bytes.
    pub bytes: Bytes,
    /// Hex SHA-256 of the stored bytes (not only of the body): what the log names.
    pub sha256: String,
}

/// Hex SHA-256 of `bytes`.
#[must_use]
pub fn sha256_hex(bytes: &[u8]) -> String {
    hex::encode(Sha256::digest(bytes))
}

/// Puts a body into its envelope.
///
/// # Errors
/// [`CatalogError::Refused`] if `body` does not become a JSON object.
pub fn seal<T: Serialize>(key: &Key, body: &T) -> Result<Sealed, CatalogError> {
    let body = serde_json::to_vec(body)
        .map_err(|error| CatalogError::refused(key, format!("it is no JSON: {error}")))?;
    if body.first() != Some(&b'{') {
        return Err(CatalogError::refused(key, "its body is no JSON object"));
    }
    let hash = sha256_hex(&body);
    let bytes = [HEAD, &body, MIDDLE, hash.as_bytes(), TAIL].concat();
    Ok(Sealed {
        sha256: sha256_hex(&bytes),
        bytes: bytes.into(),
    })
}

/// The body of a stored object, its hash verified and its format checked, but not decoded.
///
/// # Errors
/// [`CatalogError::Damaged`] if a single byte is not as it was written; [`CatalogError::NewerFormat`] if
/// the body says that it has a newer major format.
pub fn verify<'a>(key: &Key, stored: &'a [u8]) -> Result<&'a RawValue, CatalogError> {
    let damaged = |what: &str| CatalogError::damaged(key, what);
    let not_sealed = || damaged("it is not `{\"body\":{...},\"sha256\":\"...\"}`, or cut short");
    let rest = stored.strip_prefix(HEAD).ok_or_else(not_sealed)?;
    let rest = rest.strip_suffix(TAIL).ok_or_else(not_sealed)?;
    let (rest, hash) = rest.split_last_chunk::<HEX_LEN>().ok_or_else(not_sealed)?;
    let body = rest.strip_suffix(MIDDLE).ok_or_else(not_sealed)?;
    if sha256_hex(body).as_bytes() != hash {
        return Err(damaged("the SHA-256 of its body is another"));
    }
    let body: &RawValue = serde_json::from_slice(body)
        .map_err(|error| damaged(&format!("its body is no JSON: {error}")))?;
    if !body.get().starts_with('{') {
        return Err(damaged("its body is no JSON object"));
    }
    refuse_newer(key, body)?;
    Ok(body)
}

/// Reads nothing but the format, so that a body that is otherwise unreadable still gets the right error.
fn refuse_newer(key: &Key, body: &RawValue) -> Result<(), CatalogError> {
    #[derive(Deserialize)]
    struct Format {
        major: u64,
    }
    #[derive(Deserialize)]
    struct Probe {
        format: Option<Format>,
    }
    let Ok(Probe { format: Some(it) }) = serde_json::from_str(body.get()) else {
        return Ok(());
    };
    if it.major > u64::from(FORMAT.major) {
        return Err(CatalogError::NewerFormat {
            key: key.as_str().to_owned(),
            major: it.major,
            supported: FORMAT.major,
        });
    }
    if it.major == 0 {
        return Err(CatalogError::damaged(key, "format 0 never existed"));
    }
    Ok(())
}

/// Verifies a stored object and decodes its body. `key` is for the error's words.
///
/// # Errors
/// As [`verify`]; [`CatalogError::Damaged`] too if the body lacks a field or has one of another type.
pub fn open<T: DeserializeOwned>(key: &Key, stored: &[u8]) -> Result<T, CatalogError> {
    let body = verify(key, stored)?;
    serde_json::from_str(body.get())
        .map_err(|error| CatalogError::damaged(key, format!("its body lacks something: {error}")))
}

/// The stored bytes of an object of at most `limit` bytes.
///
/// # Errors
/// [`CatalogError::Store`]; [`CatalogError::Damaged`] if it is larger, or shorter than the store says.
pub async fn fetch(
    store: &dyn ObjectStore,
    key: &Key,
    limit: usize,
) -> Result<Bytes, CatalogError> {
    let body = store.get(key, None).await?;
    let size = body.size;
    if size > limit as u64 {
        let what = format!("it has {size} bytes, more than the {limit} that one may have");
        return Err(CatalogError::damaged(key, what));
    }
    let bytes = body
        .collect(key, limit)
        .await
        .map_err(|error| match error {
            StoreError::Corrupt(detail) => CatalogError::damaged(key, detail.message.clone()),
            other => other.into(),
        })?;
    if bytes.len() as u64 != size {
        let what = format!("{} of {size} bytes arrived", bytes.len());
        return Err(CatalogError::damaged(key, what));
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::{Map, Value, json};

    use super::*;

    fn key() -> Key {
        Key::new("some/object.json").unwrap()
    }

    #[test]
    fn what_was_sealed_opens_and_its_layout_is_fixed() {
        let sealed = seal(&key(), &json!({"a": 1})).unwrap();
        let text = std::str::from_utf8(&sealed.bytes).unwrap();
        let hash = sha256_hex(b"{\"a\":1}");
        assert_eq!(
            text,
            format!("{{\"body\":{{\"a\":1}},\"sha256\":\"{hash}\"}}")
        );
        assert_eq!(sealed.sha256, sha256_hex(&sealed.bytes));
        assert_eq!(
            open::<Value>(&key(), &sealed.bytes).unwrap(),
            json!({"a": 1})
        );
    }

    #[test]
    fn a_body_that_is_no_object_is_refused() {
        assert!(matches!(
            seal(&key(), &json!([1])),
            Err(CatalogError::Refused { .. })
        ));
    }

    #[test]
    fn a_newer_major_is_refused_with_its_number_though_the_rest_is_unreadable() {
        #[derive(Debug, Deserialize)]
        struct Body {
            #[expect(dead_code, reason = "only its absence matters")]
            needed: u32,
        }
        let sealed = seal(&key(), &json!({"format": {"major": 7}, "other": []})).unwrap();
        let error = open::<Body>(&key(), &sealed.bytes).unwrap_err();
        assert!(
            matches!(error, CatalogError::NewerFormat { major: 7, .. }),
            "{error}"
        );
        assert!(error.to_string().contains("format 7"), "{error}");
        let sealed = seal(&key(), &json!({"format": {"major": 1, "minor": 99}})).unwrap();
        assert!(matches!(
            open::<Body>(&key(), &sealed.bytes),
            Err(CatalogError::Damaged { .. })
        ));
    }

    #[test]
    fn a_hostile_depth_is_an_error_and_no_overflow() {
        let body = format!("{{\"a\":{}{}}}", "[".repeat(100_000), "]".repeat(100_000));
        let text = format!(
            "{{\"body\":{body},\"sha256\":\"{}\"}}",
            sha256_hex(body.as_bytes())
        );
        assert!(matches!(
            open::<Value>(&key(), text.as_bytes()),
            Err(CatalogError::Damaged { .. })
        ));
    }

    proptest! {
        #[test]
        fn any_body_comes_back_and_any_change_is_found(
            fields in proptest::collection::btree_map("[a-z\\\\\"é]{1,8}", "\\PC{0,12}", 0..6),
            at in any::<prop::sample::Index>(),
            flip in 1_u8..=255,
            inserted in any::<u8>(),
        ) {
            let body: Map<String, Value> =
                fields.into_iter().map(|(name, value)| (name, value.into())).collect();
            let sealed = seal(&key(), &body).unwrap();
            prop_assert_eq!(&open::<Map<String, Value>>(&key(), &sealed.bytes).unwrap(), &body);

            let at = at.index(sealed.bytes.len());
            let mut changed = sealed.bytes.to_vec();
            changed[at] ^= flip;
            prop_assert!(open::<Value>(&key(), &changed).is_err());
            let mut longer = sealed.bytes.to_vec();
            longer.insert(at, inserted);
            prop_assert!(open::<Value>(&key(), &longer).is_err());
            let mut shorter = sealed.bytes.to_vec();
            shorter.remove(at);
            prop_assert!(open::<Value>(&key(), &shorter).is_err());
            prop_assert!(open::<Value>(&key(), &sealed.bytes[..at]).is_err());
        }

        #[test]
        fn no_bytes_make_it_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            prop_assert!(open::<Value>(&key(), &bytes).is_err());
        }
    }
}
