//! Plain WAL files into objects.

use pipeline::error::PipelineError;
use pipeline::frame::{FRAME_STORED_MAX, FrameEncoder};
use pipeline::pack::FRAME_PLAIN_MAX;
use pipeline::store::StoreError;
use pipeline::upload::Uploader;
use sha2::{Digest as _, Sha256};
use tokio::io::{AsyncRead, AsyncReadExt as _};
use uuid::Uuid;

use super::trailer::Trailer;
use super::{StoredWal, WAL_FILE_LIMIT, WalFile, get_segment};
use crate::error::CatalogError;

/// Puts a WAL file into the bucket at zstd `level`. If its object is there already, that is read and
/// verified, and counts if its plain bytes are the same. Memory: two frames beside the uploader's budget.
///
/// # Errors
/// [`CatalogError::Conflict`] if the object is there with other plain bytes: two servers write under one
/// epoch, and nothing may go on. [`CatalogError::Damaged`] if it is there and is damaged;
/// [`CatalogError::Refused`] if `plain` has not the size of a whole segment; [`CatalogError::Source`] if it
/// cannot be read; [`CatalogError::Store`], [`CatalogError::Pipeline`]. Nothing is left under way.
pub async fn put_segment<R: AsyncRead + Unpin>(
    uploader: &Uploader,
    file: &WalFile,
    level: i32,
    mut plain: R,
) -> Result<StoredWal, CatalogError> {
    let key = file.key();
    let mut object = uploader.object(key.clone());
    let mut stage = Stage::new(level)?;
    let mut length = 0;
    loop {
        stage.plain.clear();
        let mut frame = (&mut plain).take(FRAME_PLAIN_MAX as u64);
        let read = frame.read_to_end(&mut stage.plain).await;
        let read = read.map_err(|source| CatalogError::source(&key, source))?;
        if read == 0 {
            break;
        }
        length += read as u64;
        if length > WAL_FILE_LIMIT {
            return Err(CatalogError::refused(
                &key,
                "it is larger than any WAL file",
            ));
        }
        stage = stage.run().await?;
        object.write(stage.stored()).await?;
    }
    let whole = length.is_power_of_two() && length >= 1 << 20;
    if length == 0 || !(whole || file.name.is_history()) {
        let what = format!("{length} bytes are not a whole segment");
        return Err(CatalogError::refused(&key, what));
    }
    let plain_sha256: [u8; 32] = stage.plain_hash.finalize().into();
    let trailer = Trailer {
        file: file.clone(),
        length,
        nonce: Uuid::new_v4(),
        plain_sha256,
    };
    object.write(&trailer.encode(stage.stored_hash)).await?;
    let plain_sha256 = hex::encode(plain_sha256);
    match object.finish().await {
        Ok(stored) => Ok(StoredWal {
            plain_bytes: length,
            stored_bytes: stored.size,
            plain_sha256,
        }),
        Err(PipelineError::Store(StoreError::AlreadyExists(_))) => {
            let theirs = get_segment(&**uploader.store(), file, &mut tokio::io::sink()).await?;
            if theirs.plain_sha256 == plain_sha256 {
                return Ok(theirs);
            }
            let what = "another WAL file of this name is in this epoch already";
            Err(CatalogError::conflict(&key, what))
        }
        Err(error) => Err(error.into()),
    }
}

/// What goes to the thread that compresses and comes back.
struct Stage {
    encoder: FrameEncoder,
    plain: Vec<u8>,
    out: Vec<u8>,
    stored_len: usize,
    plain_hash: Sha256,
    stored_hash: Sha256,
}

impl Stage {
    fn new(level: i32) -> Result<Self, CatalogError> {
        Ok(Self {
            encoder: FrameEncoder::new(level)?,
            plain: Vec::with_capacity(FRAME_PLAIN_MAX),
            out: vec![0; FRAME_STORED_MAX],
            stored_len: 0,
            plain_hash: Sha256::new(),
            stored_hash: Sha256::new(),
        })
    }

    /// Compresses and hashes `plain`: some milliseconds, not on a thread that serves sockets.
    async fn run(mut self) -> Result<Self, CatalogError> {
        let work = tokio::task::spawn_blocking(move || -> Result<Self, PipelineError> {
            let stamp = self.encoder.encode(&self.plain, &mut self.out)?;
            self.stored_len = stamp.stored_len as usize;
            self.plain_hash.update(&self.plain);
            self.stored_hash.update(&self.out[..self.stored_len]);
            Ok(self)
        });
        let stage = work.await.map_err(|_| PipelineError::Panicked {
            thread: "wal frame".into(),
        })??;
        Ok(stage)
    }

    fn stored(&self) -> &[u8] {
        &self.out[..self.stored_len]
    }
}
