//! WAL of a running node, from its slot into the bucket.
