//! Counts the requests that go through a proxy, by reading them as they pass.

/// A head that is longer is none.
const HEAD_BYTES_MAX: usize = 64 << 10;

/// How many requests of each kind an S3 server was sent.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Requests {
    /// Listings: GET with `list-type`.
    pub lists: u64,
    /// Reads of objects or ranges of them.
    pub gets: u64,
    /// Everything else.
    pub others: u64,
}

impl Requests {
    /// Returns how many there were.
    pub fn all(self) -> u64 {
        self.lists + self.gets + self.others
    }

    /// Returns how many came since `earlier`.
    #[must_use]
    pub fn since(self, earlier: Self) -> Self {
        Self {
            lists: self.lists - earlier.lists,
            gets: self.gets - earlier.gets,
            others: self.others - earlier.others,
        }
    }

    fn add(&mut self, request_line: &str) {
        let mut words = request_line.split(' ');
        match (words.next(), words.next()) {
            (Some("GET"), Some(target)) if target.contains("list-type=2") => self.lists += 1,
            (Some("GET"), Some(_)) => self.gets += 1,
            _ => self.others += 1,
        }
    }
}

/// What one connection sends, read as HTTP/1.1 with bodies of known length.
#[derive(Debug, Default)]
pub(crate) struct RequestReader {
    head: Vec<u8>,
    /// Bytes of the current body that are still to come.
    body: u64,
    /// Whether it is no HTTP after all.
    lost: bool,
}

impl RequestReader {
    /// Reads what passes, and counts each request whose head is complete.
    pub(crate) fn pass(&mut self, mut bytes: &[u8], requests: &mut Requests) {
        while !bytes.is_empty() && !self.lost {
            if self.body > 0 {
                let skipped = usize::try_from(self.body).unwrap_or(usize::MAX).min(bytes.len());
                self.body -= skipped as u64;
                bytes = &bytes[skipped..];
                continue;
            }
            self.head.push(bytes[0]);
            bytes = &bytes[1..];
            if self.head.ends_with(b"\r\n\r\n") {
                let head = String::from_utf8_lossy(&self.head).into_owned();
                self.head.clear();
                requests.add(head.lines().next().unwrap_or_default());
                self.body = body_bytes(&head);
            }
            self.lost = self.head.len() > HEAD_BYTES_MAX;
        }
    }
}

fn body_bytes(head: &str) -> u64 {
    let fields = head.lines().skip(1).filter_map(|line| line.split_once(':'));
    let mut lengths = fields.filter(|(name, _)| name.eq_ignore_ascii_case("content-length"));
    lengths.next().and_then(|(_, length)| length.trim().parse().ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_counted_however_they_are_cut() {
        let sent = "GET /b?list-type=2&prefix=x HTTP/1.1\r\nhost: a\r\n\r\nPUT /b/k HTTP/1.1\r\n\
                    Content-Length: 28\r\n\r\nGET / HTTP/1.1\r\n\r\nGET /b\r\n\r\nGET /b/k HTTP/1.1\r\n\r\nHEAD /b HTTP/1.1\r\n\r\n";
        for cut in 1..sent.len() {
            let (mut reader, mut requests) = (RequestReader::default(), Requests::default());
            sent.as_bytes().chunks(cut).for_each(|piece| reader.pass(piece, &mut requests));
            assert_eq!(requests, Requests { lists: 1, gets: 1, others: 2 }, "in pieces of {cut}");
        }
    }
}
