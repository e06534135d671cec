//! What is said over the agent's socket: one question, signs of life, one answer.
//!
//! The one who asks writes its question at once; the agent begins with its greeting. Every message is its
//! length (four bytes, big endian), a letter, and fields, each with a length of its own. Pure: bytes to
//! values and back.

use std::ffi::OsString;
use std::io::{self, Read, Write};
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::path::PathBuf;

/// What the agent says first. Another version has another greeting, and a socket of another name.
pub const GREETING: &[u8; 16] = b"walship agent 1\n";

/// No message is longer: two paths, or a report of a few lines.
pub const MESSAGE_BYTES_MAX: usize = 64 << 10;

/// What a thin command wants.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Question {
    /// Make the file durable in every repository.
    Push {
        /// Its absolute path.
        path: PathBuf,
    },
    /// Get a WAL file.
    Fetch {
        /// Its name.
        name: OsString,
        /// The absolute path where the server wants it. The agent does not touch it.
        target: PathBuf,
    },
}

/// What the agent says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer {
    /// It is at work.
    Working,
    /// The status for PostgreSQL, and what is to be said on standard error.
    Status {
        /// The status.
        status: u8,
        /// Lines, or nothing.
        text: String,
    },
    /// The file lies here, whole and checked, and is the asker's to take.
    File {
        /// The absolute path.
        path: PathBuf,
    },
    /// It cannot answer this one: the asker has to do the work itself.
    Foreground {
        /// Why.
        reason: String,
    },
}

impl Question {
    /// Returns the message.
    pub fn to_message(&self) -> Vec<u8> {
        match self {
            Self::Push { path } => message(b'P', &[path.as_os_str().as_bytes()]),
            Self::Fetch { name, target } => message(b'F', &[name.as_bytes(), target.as_os_str().as_bytes()]),
        }
    }

    /// Reads a message without its length; `None` when it makes no sense.
    pub fn parse(body: &[u8]) -> Option<Self> {
        let (letter, fields) = fields(body)?;
        let path = |bytes: &[u8]| PathBuf::from(OsString::from_vec(bytes.to_vec()));
        let question = match (letter, &*fields) {
            (b'P', [file]) => Self::Push { path: path(file) },
            (b'F', [name, target]) => {
                Self::Fetch { name: OsString::from_vec(name.to_vec()), target: path(target) }
            }
            _ => return None,
        };
        let (Self::Push { path } | Self::Fetch { target: path, .. }) = &question;
        path.is_absolute().then_some(question)
    }
}

impl Answer {
    /// Returns the message. A text is cut where it would make the message too long.
    pub fn to_message(&self) -> Vec<u8> {
        let cut = |text: &str| text.as_bytes()[..text.len().min(MESSAGE_BYTES_MAX / 2)].to_vec();
        match self {
            Self::Working => message(b'w', &[]),
            Self::Status { status, text } => message(b's', &[&[*status], &cut(text)]),
            Self::File { path } => message(b'f', &[path.as_os_str().as_bytes()]),
            Self::Foreground { reason } => message(b'g', &[&cut(reason)]),
        }
    }

    /// Reads a message without its length; `None` when it makes no sense.
    pub fn parse(body: &[u8]) -> Option<Self> {
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        Some(match fields(body)? {
            (b'w', fields) if fields.is_empty() => Self::Working,
            (b's', fields) => match &*fields {
                [[status], said] => Self::Status { status: *status, text: text(said) },
                _ => return None,
            },
            (b'f', fields) => match &*fields {
                [path] => Self::File { path: OsString::from_vec(path.to_vec()).into() },
                _ => return None,
            },
            (b'g', fields) => match &*fields {
                [reason] => Self::Foreground { reason: text(reason) },
                _ => return None,
            },
            _ => return None,
        })
    }
}

/// Reads one answer; `None` when what comes is none. Blocks as long as `source` does.
///
/// # Errors
/// What `source` says; that it ended is [`io::ErrorKind::UnexpectedEof`].
pub fn read_answer(source: &mut impl Read) -> io::Result<Option<Answer>> {
    let mut length = [0; 4];
    source.read_exact(&mut length)?;
    let Some(length) = body_length(length) else { return Ok(None) };
    let mut body = vec![0; length];
    source.read_exact(&mut body)?;
    Ok(Answer::parse(&body))
}

/// Writes one question. Blocks as long as `sink` does.
///
/// # Errors
/// What `sink` says.
pub fn write_question(sink: &mut impl Write, question: &Question) -> io::Result<()> {
    sink.write_all(&question.to_message())
}

/// Returns how long the rest of a message is after these first bytes; `None` when no message is so long.
pub fn body_length(start: [u8; 4]) -> Option<usize> {
    usize::try_from(u32::from_be_bytes(start)).ok().filter(|length| (1..=MESSAGE_BYTES_MAX).contains(length))
}

fn message(letter: u8, fields: &[&[u8]]) -> Vec<u8> {
    let length = |bytes: usize| u32::try_from(bytes).unwrap_or(u32::MAX).to_be_bytes();
    let mut body = vec![letter];
    for field in fields {
        body.extend_from_slice(&length(field.len()));
        body.extend_from_slice(field);
    }
    let mut message = length(body.len()).to_vec();
    message.extend_from_slice(&body);
    message
}

fn fields(body: &[u8]) -> Option<(u8, Vec<&[u8]>)> {
    let (letter, mut rest) = body.split_first()?;
    let mut fields = Vec::new();
    while !rest.is_empty() {
        let (length, behind) = rest.split_first_chunk::<4>()?;
        let length = usize::try_from(u32::from_be_bytes(*length)).ok()?;
        fields.push(behind.get(..length)?);
        rest = behind.get(length..)?;
    }
    Some((*letter, fields))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_back() {
        let odd = OsString::from_vec(b"/srv/\xff\n\"x".to_vec());
        for question in [
            Question::Push { path: odd.clone().into() },
            Question::Fetch { name: "00000002.history".into(), target: "/d/pg_wal/RECOVERYHISTORY".into() },
        ] {
            let message = question.to_message();
            let (start, body) = message.split_first_chunk().unwrap();
            assert_eq!(body_length(*start), Some(body.len()));
            assert_eq!(Question::parse(body), Some(question));
        }
        for answer in [
            Answer::Working,
            Answer::Status { status: 75, text: "error: x\nsafe:  y".into() },
            Answer::File { path: odd.into() },
            Answer::Foreground { reason: String::new() },
        ] {
            assert_eq!(read_answer(&mut &*answer.to_message()).unwrap(), Some(answer));
        }
    }

    #[test]
    fn nonsense_is_refused_without_a_panic() {
        let question = Question::Push { path: "/a/b".into() }.to_message();
        let body = &question[4..];
        for length in 0..body.len() {
            assert_eq!(Question::parse(&body[..length]), None, "{length}");
        }
        assert_eq!(
            Question::parse(&Question::Push { path: "a/b".into() }.to_message()[4..]),
            None,
            "relative"
        );
        assert_eq!(Question::parse(b"P\xff\xff\xff\xffx"), None);
        assert_eq!(body_length([0; 4]), None);
        assert_eq!(body_length([1, 0, 0, 0]), None);
        assert_eq!(read_answer(&mut &b"\x00\x00\x00\x01z"[..]).unwrap(), None);
        assert_eq!(
            read_answer(&mut &b"\x00\x00\x00\x05w"[..]).unwrap_err().kind(),
            io::ErrorKind::UnexpectedEof
        );
    }

    #[test]
    fn a_long_text_is_cut_so_that_its_message_can_be_read() {
        let answer = Answer::Status { status: 1, text: "x".repeat(1 << 20) };
        let Some(Answer::Status { status: 1, text }) = read_answer(&mut &*answer.to_message()).unwrap()
        else {
            panic!("no status");
        };
        assert_eq!(text.len(), MESSAGE_BYTES_MAX / 2);
    }
}
