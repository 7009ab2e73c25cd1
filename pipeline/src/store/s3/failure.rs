//! From what the SDK says of one attempt to what can be done about it.

use std::error::Error;
use std::io;

use aws_credential_types::provider::error::CredentialsError;
use aws_sdk_s3::config::http::HttpResponse;
use aws_sdk_s3::error::{ProvideErrorMetadata, SdkError};
use hyper_util::client::legacy::Error as HyperClientError;

use crate::store::{Detail, StoreError};

/// Makes the error of its detail.
type Make = fn(Box<Detail>) -> StoreError;

/// What one failed attempt left behind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fate {
    /// The store said no; it would again.
    Final,
    /// Nothing reached the store, or it took nothing: the same call may succeed later.
    NotTaken,
    /// As [`Fate::NotTaken`], and the store asks for a pause.
    Throttled,
    /// The keys are old: as [`Fate::NotTaken`] once there are new ones.
    StaleKeys,
    /// The request was sent and no clear answer came.
    Lost,
}

/// One failed attempt.
#[derive(Debug)]
pub(super) struct Failure {
    pub(super) fate: Fate,
    pub(super) error: StoreError,
}

/// The call an attempt belongs to, for its errors.
#[derive(Debug, Clone, Copy)]
pub(super) struct Subject<'a> {
    pub(super) operation: &'static str,
    pub(super) key: &'a str,
}

impl Subject<'_> {
    #[expect(
        clippy::unnecessary_box_returns,
        reason = "the errors hold it in a box"
    )]
    pub(super) fn detail(&self, message: impl Into<String>) -> Box<Detail> {
        Detail::new(self.operation, self.key, message)
    }

    /// No answer came within the attempt's deadline.
    pub(super) fn late(&self, seconds: f64) -> Failure {
        let message = format!("no answer within {seconds:.0} s");
        Failure {
            fate: Fate::Lost,
            error: StoreError::Unavailable(self.detail(message)),
        }
    }

    /// What `error` means.
    pub(super) fn failure<E>(&self, error: &SdkError<E, HttpResponse>) -> Failure
    where
        E: ProvideErrorMetadata + Error + 'static,
    {
        let raw = match error {
            SdkError::ServiceError(answer) => answer.raw(),
            SdkError::ResponseError(answer) => answer.raw(),
            other => return self.no_answer(other),
        };
        let meta = match error {
            SdkError::ServiceError(answer) => Some(answer.err().meta()),
            _ => None,
        };
        let header = |name: &str| Some(raw.headers().get(name)?.trim_matches('"'));
        let answer = Answer {
            status: raw.status().as_u16(),
            // Answers to HEAD have no body, and the SDK makes `NotFound` of every 404; MinIO puts code
            // and message into headers.
            code: header("x-minio-error-code")
                .or_else(|| meta.and_then(|meta| meta.code()))
                .unwrap_or_default(),
            message: header("x-minio-error-desc")
                .or_else(|| meta.and_then(|meta| meta.message()))
                .unwrap_or_default(),
            region: raw
                .headers()
                .get("x-amz-bucket-region")
                .map(str::to_owned)
                .or_else(|| element(raw.body().bytes(), "Region"))
                .or_else(|| element(raw.body().bytes(), "Endpoint")),
        };
        let (fate, make) = answer.meaning();
        let mut words = answer.words();
        if raw.status().is_success() {
            // The request took effect or not; the answer cannot be read.
            words = format!("unreadable answer: {}", chain(error));
        }
        Failure {
            fate,
            error: make(self.detail(words)),
        }
    }

    /// One object's refusal in an answer about many; none if it only says that there was none.
    pub(super) fn refused(&self, code: &str, message: &str) -> Option<StoreError> {
        let answer = Answer {
            status: 200,
            code,
            message,
            region: None,
        };
        let (_, make) = answer.meaning();
        (code != "NoSuchKey").then(|| make(self.detail(answer.words())))
    }

    fn no_answer<E>(&self, error: &SdkError<E, HttpResponse>) -> Failure
    where
        E: Error + 'static,
    {
        let words = chain(error);
        let find = |test: &dyn Fn(&(dyn Error + 'static)) -> bool| links(error).any(test);
        let connecting = find(&|link| {
            link.downcast_ref::<HyperClientError>()
                .is_some_and(HyperClientError::is_connect)
        });
        let keys = links(error).find_map(|link| link.downcast_ref::<CredentialsError>());
        let certificate = find(&|link| link.is::<rustls::Error>());
        let (fate, make, words): (Fate, Make, String) = if let Some(keys) = keys {
            let words = keys.source().map_or_else(|| chain(keys), chain);
            (Fate::Final, StoreError::Unauthenticated, words)
        } else if certificate {
            let words = format!("TLS, the server's certificate or its answer: {words}");
            (Fate::Final, StoreError::Unavailable, words)
        } else {
            match error {
                SdkError::ConstructionFailure(_) => (Fate::Final, StoreError::Invalid, words),
                SdkError::DispatchFailure(failure) if failure.is_user() => {
                    (Fate::Final, StoreError::Invalid, words)
                }
                // Only connecting has a timeout inside the SDK; see `client`.
                SdkError::DispatchFailure(failure) if connecting || failure.is_timeout() => {
                    (Fate::NotTaken, StoreError::Unavailable, words)
                }
                _ => (Fate::Lost, StoreError::Unavailable, words),
            }
        };
        Failure {
            fate,
            error: make(self.detail(words)),
        }
    }
}

/// What the store answered, other than success.
struct Answer<'a> {
    status: u16,
    code: &'a str,
    message: &'a str,
    /// The region (or endpoint) the store points to.
    region: Option<String>,
}

impl Answer<'_> {
    fn meaning(&self) -> (Fate, Make) {
        use StoreError as E;
        match self.code {
            "NoSuchBucket" => (Fate::Final, E::NoSuchBucket),
            "NoSuchKey" | "NoSuchUpload" => (Fate::Final, E::NotFound),
            "PreconditionFailed" => (Fate::Final, E::AlreadyExists),
            // Another writer is at the same key just now: the next attempt sees who won.
            "ConditionalRequestConflict" | "OperationAborted" => (Fate::Lost, E::Unavailable),
            "BadDigest"
            | "InvalidDigest"
            | "XAmzContentChecksumMismatch"
            | "XAmzContentSHA256Mismatch"
            | "InvalidRange" => (Fate::Final, E::Corrupt),
            "IncompleteBody" | "RequestTimeout" => (Fate::NotTaken, E::Unavailable),
            "SlowDown"
            | "SlowDownRead"
            | "SlowDownWrite"
            | "Throttling"
            | "ThrottlingException"
            | "RequestLimitExceeded"
            | "TooManyRequests"
            | "BandwidthLimitExceeded" => (Fate::Throttled, E::Throttled),
            "ExpiredToken"
            | "ExpiredTokenException"
            | "TokenRefreshRequired"
            | "InvalidToken"
            | "InvalidTokenId"
            | "InvalidAccessKeyId" => (Fate::StaleKeys, E::Unauthenticated),
            "SignatureDoesNotMatch" | "InvalidSecurity" | "MissingSecurityHeader" => {
                (Fate::StaleKeys, E::Unauthenticated)
            }
            "AccessDenied" | "AllAccessDisabled" | "AccountProblem" => {
                (Fate::Final, E::PermissionDenied)
            }
            "PermanentRedirect"
            | "TemporaryRedirect"
            | "Redirect"
            | "AuthorizationHeaderMalformed"
            | "IllegalLocationConstraintException"
            | "IncorrectEndpoint" => (Fate::Final, E::Invalid),
            _ => self.meaning_of_status(),
        }
    }

    fn meaning_of_status(&self) -> (Fate, Make) {
        use StoreError as E;
        match self.status {
            401 => (Fate::StaleKeys, E::Unauthenticated),
            403 => (Fate::Final, E::PermissionDenied),
            404 if self.code == "NotFound" => (Fate::Final, E::NotFound),
            408 | 507 => (Fate::NotTaken, E::Unavailable),
            412 => (Fate::Final, E::AlreadyExists),
            416 => (Fate::Final, E::Corrupt),
            429 => (Fate::Throttled, E::Throttled),
            501 | 505 => (Fate::Final, E::Invalid),
            200..300 | 500.. => (Fate::Lost, E::Unavailable),
            _ => (Fate::Final, E::Invalid),
        }
    }

    fn words(&self) -> String {
        let mut words = match (self.code, self.message) {
            ("", "") => format!("HTTP status {}, no error of S3's in it", self.status),
            (code, "") => format!("{code} (HTTP status {})", self.status),
            ("", message) => format!("HTTP status {}: {message}", self.status),
            (code, message) => format!("{code}: {message}"),
        };
        let redirects = matches!(self.status, 301 | 307 | 400);
        if let Some(region) = self
            .region
            .as_ref()
            .filter(|region| redirects && !words.contains(*region))
        {
            words = format!("{words} (the store points to `{region}`)");
        }
        words
    }
}

/// The text of an XML element in an error's body.
fn element(body: Option<&[u8]>, name: &str) -> Option<String> {
    let text = std::str::from_utf8(body?).ok()?;
    let (_, rest) = text.split_once(&format!("<{name}>"))?;
    let (value, _) = rest.split_once("</")?;
    (!value.is_empty() && value.len() < 200).then(|| value.to_owned())
}

/// An error and what caused it. `io::Error::source` skips the error it wraps, so it is asked for.
fn links<'a>(error: &'a (dyn Error + 'static)) -> impl Iterator<Item = &'a (dyn Error + 'static)> {
    std::iter::successors(Some(error), |&link| {
        match link.downcast_ref::<io::Error>() {
            Some(io) => io.get_ref().map(|inner| inner as &(dyn Error + 'static)),
            None => link.source(),
        }
    })
}

/// The words of an error and of what caused it, each once.
pub(super) fn chain(error: &(dyn Error + 'static)) -> String {
    let mut words = String::new();
    for link in links(error) {
        let link = link.to_string();
        if words.contains(&link) {
            continue;
        }
        if !words.is_empty() {
            words.push_str(": ");
        }
        words.push_str(&link);
    }
    words
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(status: u16, code: &'static str, region: Option<&str>) -> Answer<'static> {
        Answer {
            status,
            code,
            message: "words",
            region: region.map(str::to_owned),
        }
    }

    fn meaning(status: u16, code: &'static str) -> (Fate, StoreError) {
        let (fate, make) = answer(status, code, None).meaning();
        (fate, make(Detail::new("put", "k", "")))
    }

    #[test]
    fn a_server_error_on_a_write_is_a_lost_reply() {
        assert_eq!(meaning(500, "InternalError").0, Fate::Lost);
        assert_eq!(meaning(502, "").0, Fate::Lost);
        assert_eq!(meaning(503, "SlowDown").0, Fate::Throttled);
    }

    #[test]
    fn not_found_is_believed_only_in_s3s_words() {
        assert!(matches!(
            meaning(404, "NoSuchKey").1,
            StoreError::NotFound(_)
        ));
        assert!(matches!(meaning(404, "").1, StoreError::Invalid(_)));
    }

    #[test]
    fn the_region_is_named() {
        let words = answer(301, "PermanentRedirect", Some("eu-west-1")).words();
        assert!(words.contains("eu-west-1"), "{words}");
        let body = b"<Error><Code>X</Code><Region>eu-west-2</Region></Error>";
        assert_eq!(element(Some(body), "Region").as_deref(), Some("eu-west-2"));
    }
}
