//! The store's own clock: the `Date` of its answers.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::SystemTime;

use aws_sdk_s3::config::interceptors::BeforeDeserializationInterceptorContextRef;
use aws_sdk_s3::config::{ConfigBag, Intercept, RuntimeComponents};
use aws_sdk_s3::error::BoxError;
use aws_sdk_s3::primitives::{DateTime, DateTimeFormat};

use super::failure::Subject;
use super::{S3Store, time};
use crate::store::StoreError;

/// Keeps the `Date` of the last answer of one call.
#[derive(Debug, Clone, Default)]
struct KeepDate(Arc<Mutex<Option<String>>>);

impl KeepDate {
    fn take(&self) -> Option<String> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

impl Intercept for KeepDate {
    fn name(&self) -> &'static str {
        "KeepDate"
    }

    fn read_before_deserialization(
        &self,
        context: &BeforeDeserializationInterceptorContextRef<'_>,
        _components: &RuntimeComponents,
        _config: &mut ConfigBag,
    ) -> Result<(), BoxError> {
        let date = context.response().headers().get("date").map(str::to_owned);
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = date;
        Ok(())
    }
}

impl S3Store {
    /// Asks for a listing of one entry, the cheapest request that every repository's credentials may make
    /// and that has a body to be checked, and answers its date.
    pub(super) async fn date(&self) -> Result<SystemTime, StoreError> {
        let subject = Subject {
            operation: "read the clock of",
            key: "",
        };
        let kept = KeepDate::default();
        let prefix = self.name("");
        self.ask(subject, || {
            self.shared
                .client
                .list_objects_v2()
                .bucket(self.bucket())
                .prefix(&prefix)
                .max_keys(1)
                .customize()
                .interceptor(kept.clone())
                .send()
        })
        .await?;
        let text = kept.take();
        let parsed = text
            .as_deref()
            .and_then(|text| DateTime::from_str(text, DateTimeFormat::HttpDate).ok());
        time(parsed.as_ref()).ok_or_else(|| {
            let words = match text {
                Some(text) => format!("`Date: {text}` in its answer is no date"),
                None => "its answer has no date".to_owned(),
            };
            StoreError::Invalid(subject.detail(words))
        })
    }
}
