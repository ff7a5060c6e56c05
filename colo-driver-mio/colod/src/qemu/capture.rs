//! Captured streams: a file or standard input, plain or xz, read item by item.

use std::{
    fs::File,
    io::{self, BufRead, BufReader, Read},
    path::Path,
};

use colo_proto::qemu::{Item, Reader, StreamError};
use thiserror::Error;

use super::image::PAGE;

const XZ: &[u8] = b"\xFD7zXZ\0";
const READ: usize = 1 << 18;

/// Opens a capture; `-` is standard input. xz is known by its first bytes.
pub(super) fn open(path: &Path) -> io::Result<Box<dyn Read>> {
    let source: Box<dyn Read> = if path == Path::new("-") {
        Box::new(io::stdin().lock())
    } else {
        Box::new(File::open(path)?)
    };
    let mut source = BufReader::with_capacity(1 << 16, source);
    if source.fill_buf()?.starts_with(XZ) {
        return Ok(Box::new(xz2::bufread::XzDecoder::new_multi_decoder(source)));
    }
    Ok(Box::new(source))
}

/// Why a walk ended early.
#[derive(Debug, Error)]
pub(super) enum WalkError<E> {
    /// The capture cannot be read.
    #[error("cannot read the capture: {0}")]
    Read(#[source] io::Error),
    /// The stream is faulty, or cut.
    #[error(transparent)]
    Stream(#[from] StreamError),
    /// The visitor does not want more.
    #[error("{0}")]
    Visitor(E),
}

/// What is told of a capture, in stream order.
pub(super) trait Visitor {
    /// Why it may end the walk.
    type Error;

    /// An item; `reader` has just taken it.
    fn item(&mut self, item: &Item, reader: &Reader) -> Result<(), Self::Error>;

    /// Bytes of the last page, in pieces.
    fn page(&mut self, bytes: &[u8]) -> Result<(), Self::Error>;

    /// Small bytes as they stand in the capture, before the items that they make.
    fn raw(&mut self, bytes: &[u8]) -> Result<(), Self::Error>;
}

/// Reads a capture to its end.
pub(super) fn walk<V: Visitor>(
    mut source: impl Read,
    reader: &mut Reader,
    visitor: &mut V,
) -> Result<(), WalkError<V::Error>> {
    let mut buffer = vec![0; READ];
    loop {
        let n = match source.read(&mut buffer) {
            Ok(0) => return Ok(reader.finish()?),
            Ok(n) => n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
            // Packed data that is cut: the stream is cut where the last of it stood.
            Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => {
                reader.finish()?;
                return Err(WalkError::Read(e));
            }
            Err(e) => return Err(WalkError::Read(e)),
        };
        let mut input = buffer.get(..n).unwrap_or_default();
        loop {
            if let Some(place) = reader.demand().place {
                if input.is_empty() {
                    break;
                }
                let (page, rest) = input.split_at(input.len().min(PAGE - place.skip));
                visitor.page(page).map_err(WalkError::Visitor)?;
                // No more than was demanded.
                if reader.handle_placed(page.len()).is_err() {
                    break;
                }
                input = rest;
            }
            let before = input;
            let item = reader.handle_bytes(&mut input)?;
            let taken = before.len() - input.len();
            let taken = before.get(..taken).unwrap_or_default();
            if !taken.is_empty() {
                visitor.raw(taken).map_err(WalkError::Visitor)?;
            }
            match item {
                Some(item) => visitor.item(&item, reader).map_err(WalkError::Visitor)?,
                None if input.is_empty() && reader.demand().place.is_none() => break,
                None => {}
            }
        }
    }
}
