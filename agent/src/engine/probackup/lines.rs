//! The program's output in lines: they end with `\n` or, while something is counted up in place, with `\r`.

use std::mem;

/// Bytes of one line that are kept. A line may be longer, without limit; the rest of it is passed over.
const KEPT: usize = 8 << 10;

/// Cuts a stream of bytes into lines. Memory: one line, of which at most 8 KiB are kept.
#[derive(Debug, Default)]
pub struct Lines {
    line: Vec<u8>,
    cut: bool,
}

impl Lines {
    /// Takes the next bytes and hands every line that ends in them to `sink`, blank ones left out.
    pub fn feed(&mut self, bytes: &[u8], sink: &mut impl FnMut(String)) {
        for piece in bytes.split_inclusive(|byte| matches!(byte, b'\n' | b'\r')) {
            let (text, ends) = match piece.split_last() {
                Some((b'\n' | b'\r', text)) => (text, true),
                _ => (piece, false),
            };
            let room = KEPT - self.line.len();
            self.cut |= text.len() > room;
            self.line.extend_from_slice(&text[..text.len().min(room)]);
            if ends {
                self.end(sink);
            }
        }
    }

    /// Hands out what came after the last end of a line.
    pub fn finish(mut self, sink: &mut impl FnMut(String)) {
        self.end(sink);
    }

    fn end(&mut self, sink: &mut impl FnMut(String)) {
        let line = mem::take(&mut self.line);
        let cut = mem::take(&mut self.cut);
        let text = String::from_utf8_lossy(&line);
        // What it prints goes to terminals and logs: no escape sequences of its making.
        let plain = text
            .chars()
            .map(|c| if c.is_control() { ' ' } else { c })
            .collect::<String>();
        let mut plain = plain.trim_end().to_owned();
        if plain.is_empty() {
            return;
        }
        if cut {
            plain.push_str(" ...");
        }
        sink(plain);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(pieces: &[&[u8]]) -> Vec<String> {
        let mut found = Vec::new();
        let mut lines = Lines::default();
        for piece in pieces {
            lines.feed(piece, &mut |line| found.push(line));
        }
        lines.finish(&mut |line| found.push(line));
        found
    }

    #[test]
    fn lines_end_with_either_and_may_come_in_pieces() {
        let found = lines(&[b"INFO: a\r\n  \r", b"Progress: 4", b"5%\rERR", b"OR: b"]);
        assert_eq!(found, ["INFO: a", "Progress: 45%", "ERROR: b"]);
        assert!(lines(&[b"\n\r\n", b""]).is_empty());
    }

    #[test]
    fn a_line_without_an_end_takes_no_memory() {
        let mut kept = Lines::default();
        for _ in 0..1000 {
            kept.feed(&[b'x'; 4096], &mut |_| panic!("it has not ended"));
            assert!(kept.line.capacity() <= 2 * KEPT);
        }
        let mut found = Vec::new();
        kept.feed(b"\nnext\n", &mut |line| found.push(line));
        assert_eq!(found.len(), 2);
        assert!(found[0].ends_with("x ...") && found[0].len() < KEPT + 8);
        assert_eq!(found[1], "next");
    }

    #[test]
    fn what_is_printed_is_no_terminal_s_business() {
        assert_eq!(lines(&[b"\x1b[31mred\xff\n"]), [" [31mred\u{fffd}"]);
    }
}
