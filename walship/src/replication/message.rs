//! The wire protocol's messages as values: a pure codec on `postgres-protocol`, total on any bytes.

use bytes::{Buf as _, Bytes, BytesMut};
use fallible_iterator::FallibleIterator as _;
use postgres_protocol::message::backend::{self, Message};

use super::server_error::ServerError;
use crate::pg::ParseError;

/// The longest message that is accepted once a session is up. Servers send WAL and base backups in
/// pieces of at most 128 KiB; a row of settings is far smaller.
pub const MAX_BYTES: usize = 64 << 20;

/// The longest message that is accepted from a server that has not authenticated us.
pub const MAX_BYTES_STARTUP: usize = 64 << 10;

/// A message of the server's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum BackendMessage {
    /// Authentication is done.
    AuthenticationOk,
    /// The server wants the password itself.
    CleartextPassword,
    /// The server wants an MD5 digest with this salt.
    Md5Password([u8; 4]),
    /// The server offers these SASL mechanisms.
    Sasl(Vec<String>),
    /// The server's next SASL message.
    SaslContinue(Bytes),
    /// The server's last SASL message.
    SaslFinal(Bytes),
    /// The server wants something we do not speak, by name.
    UnsupportedAuthentication(&'static str),
    /// A setting's value.
    ParameterStatus(String, String),
    /// The server waits for a command.
    ReadyForQuery,
    /// The names of a result's columns.
    RowDescription(Vec<String>),
    /// A row in text; `None` is NULL.
    DataRow(Vec<Option<String>>),
    /// A command is done; its tag.
    CommandComplete(String),
    /// The server waits for a COPY to it.
    CopyIn,
    /// A COPY from the server begins.
    CopyOut,
    /// A COPY in both directions begins.
    CopyBoth,
    /// A piece of a COPY.
    CopyData(Bytes),
    /// A COPY ends.
    CopyDone,
    /// The server refused.
    Error(ServerError),
    /// The server remarks.
    Notice(ServerError),
    /// Something that needs no answer.
    Other,
}

/// Returns how many bytes the message at the start of `buffer` lacks, as far as that can be told.
pub fn missing(buffer: &[u8]) -> usize {
    let Some(header) = buffer.first_chunk::<5>() else { return 5 - buffer.len() };
    let length = u32::from_be_bytes([header[1], header[2], header[3], header[4]]) as usize;
    length.saturating_add(1).saturating_sub(buffer.len())
}

/// Takes the next whole message off `buffer`; `None` when more bytes are needed.
///
/// # Errors
/// [`ParseError`] for a message that is longer than `max_bytes` or makes no sense; the stream
/// cannot be followed after that.
pub fn decode(buffer: &mut BytesMut, max_bytes: usize) -> Result<Option<BackendMessage>, ParseError> {
    let Some(header) = buffer.first_chunk::<5>() else { return Ok(None) };
    let (tag, length) =
        (header[0], u32::from_be_bytes([header[1], header[2], header[3], header[4]]) as usize);
    if length < 4 || length > max_bytes {
        return Err(ParseError::new(format!(
            "a message of type {:?} claims {length} bytes",
            char::from(tag)
        )));
    }
    if buffer.len() < length + 1 {
        return Ok(None);
    }
    let mut frame = buffer.split_to(length + 1);
    match tag {
        b'd' => {
            frame.advance(5);
            return Ok(Some(BackendMessage::CopyData(frame.freeze())));
        }
        // CopyBothResponse, which postgres-protocol does not know; the formats are always text.
        b'W' => return Ok(Some(BackendMessage::CopyBoth)),
        // Longer cancel keys and protocol negotiation of newer protocols: nothing we need.
        b'K' | b'v' => return Ok(Some(BackendMessage::Other)),
        _ => {}
    }
    let bad = |error: std::io::Error| {
        ParseError::new(format!("a message of type {:?} makes no sense: {error}", char::from(tag)))
    };
    let message = Message::parse(&mut frame).map_err(bad)?;
    let message = message.ok_or_else(|| ParseError::new("a message was cut short"))?;
    translate(message).map(Some).map_err(bad)
}

fn translate(message: Message) -> std::io::Result<BackendMessage> {
    Ok(match message {
        Message::AuthenticationOk => BackendMessage::AuthenticationOk,
        Message::AuthenticationCleartextPassword => BackendMessage::CleartextPassword,
        Message::AuthenticationMd5Password(body) => BackendMessage::Md5Password(body.salt()),
        Message::AuthenticationSasl(body) => {
            BackendMessage::Sasl(body.mechanisms().map(|name| Ok(name.to_owned())).collect()?)
        }
        Message::AuthenticationSaslContinue(body) => {
            BackendMessage::SaslContinue(Bytes::copy_from_slice(body.data()))
        }
        Message::AuthenticationSaslFinal(body) => {
            BackendMessage::SaslFinal(Bytes::copy_from_slice(body.data()))
        }
        Message::AuthenticationGss | Message::AuthenticationGssContinue(_) => {
            BackendMessage::UnsupportedAuthentication("GSSAPI")
        }
        Message::AuthenticationSspi => BackendMessage::UnsupportedAuthentication("SSPI"),
        Message::AuthenticationKerberosV5 => BackendMessage::UnsupportedAuthentication("Kerberos 5"),
        Message::AuthenticationScmCredential => BackendMessage::UnsupportedAuthentication("SCM credentials"),
        Message::ParameterStatus(body) => {
            BackendMessage::ParameterStatus(body.name()?.to_owned(), body.value()?.to_owned())
        }
        Message::ReadyForQuery(_) => BackendMessage::ReadyForQuery,
        Message::RowDescription(body) => {
            BackendMessage::RowDescription(body.fields().map(|field| Ok(field.name().to_owned())).collect()?)
        }
        Message::DataRow(body) => BackendMessage::DataRow(data_row(&body)?),
        Message::CommandComplete(body) => BackendMessage::CommandComplete(body.tag()?.to_owned()),
        Message::CopyInResponse(_) => BackendMessage::CopyIn,
        Message::CopyOutResponse(_) => BackendMessage::CopyOut,
        Message::CopyData(body) => BackendMessage::CopyData(body.into_bytes()),
        Message::CopyDone => BackendMessage::CopyDone,
        Message::ErrorResponse(body) => BackendMessage::Error(server_error(body.fields())?),
        Message::NoticeResponse(body) => BackendMessage::Notice(server_error(body.fields())?),
        _ => BackendMessage::Other,
    })
}

fn data_row(body: &backend::DataRowBody) -> std::io::Result<Vec<Option<String>>> {
    let cut = || std::io::Error::new(std::io::ErrorKind::InvalidData, "a column lies outside its row");
    let mut columns = Vec::new();
    let mut ranges = body.ranges();
    while let Some(range) = ranges.next()? {
        columns.push(match range {
            None => None,
            Some(range) => {
                let bytes = body.buffer().get(range).ok_or_else(cut)?;
                Some(String::from_utf8_lossy(bytes).into_owned())
            }
        });
    }
    Ok(columns)
}

fn server_error(mut fields: backend::ErrorFields<'_>) -> std::io::Result<ServerError> {
    let mut error = ServerError::default();
    while let Some(field) = fields.next()? {
        let value = String::from_utf8_lossy(field.value_bytes()).into_owned();
        match field.type_() {
            // `V` is the untranslated severity and comes after `S`.
            b'S' | b'V' => error.severity = value,
            b'C' => error.code = value,
            b'M' => error.message = value,
            b'D' => error.detail = Some(value),
            b'H' => error.hint = Some(value),
            _ => {}
        }
    }
    Ok(error)
}

/// Appends a simple query.
///
/// # Errors
/// [`ParseError`] when the text holds a zero byte.
pub fn query(sql: &str, buffer: &mut BytesMut) -> Result<(), ParseError> {
    postgres_protocol::message::frontend::query(sql, buffer)
        .map_err(|error| ParseError::new(format!("the command cannot be sent: {error}")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn frame(tag: u8, body: &[u8]) -> BytesMut {
        let mut bytes = vec![tag];
        bytes.extend((body.len() as u32 + 4).to_be_bytes());
        bytes.extend(body);
        BytesMut::from(bytes.as_slice())
    }

    fn one(tag: u8, body: &[u8]) -> BackendMessage {
        decode(&mut frame(tag, body), MAX_BYTES).unwrap().unwrap()
    }

    #[test]
    fn messages_decode_to_values() {
        assert_eq!(one(b'R', &[0, 0, 0, 0]), BackendMessage::AuthenticationOk);
        assert_eq!(one(b'R', &[0, 0, 0, 5, 1, 2, 3, 4]), BackendMessage::Md5Password([1, 2, 3, 4]));
        assert_eq!(
            one(b'R', b"\0\0\0\x0aSCRAM-SHA-256-PLUS\0SCRAM-SHA-256\0\0"),
            BackendMessage::Sasl(vec!["SCRAM-SHA-256-PLUS".into(), "SCRAM-SHA-256".into()])
        );
        assert_eq!(one(b'd', b"wal"), BackendMessage::CopyData(Bytes::from_static(b"wal")));
        assert_eq!(one(b'W', b"\0\0\0"), BackendMessage::CopyBoth);
        assert_eq!(
            one(b'D', b"\0\x02\0\0\0\x02ab\xff\xff\xff\xff"),
            BackendMessage::DataRow(vec![Some("ab".into()), None])
        );
        let BackendMessage::Error(error) =
            one(b'E', b"SFEHLER\0VFATAL\0C28P01\0Mno\xff\0Hhint\0Rroutine\0\0")
        else {
            panic!("not an error");
        };
        assert_eq!((error.severity.as_str(), error.code.as_str()), ("FATAL", "28P01"));
        assert_eq!((error.message.as_str(), error.hint.as_deref()), ("no\u{fffd}", Some("hint")));
    }

    #[test]
    fn partial_and_absurd_messages_are_told_apart() {
        let whole = frame(b'S', b"a\0b\0");
        for cut in 0..whole.len() {
            assert_eq!(decode(&mut BytesMut::from(&whole[..cut]), MAX_BYTES), Ok(None));
            assert_eq!(missing(&whole[..cut]), if cut < 5 { 5 - cut } else { whole.len() - cut });
        }
        for bytes in [&b"d\x7f\xff\xff\xff"[..], b"d\0\0\0\x03", b"d\xff\xff\xff\xff"] {
            assert!(decode(&mut BytesMut::from(bytes), MAX_BYTES).is_err());
        }
        // A column that claims more than its row holds.
        assert!(decode(&mut frame(b'D', b"\0\x01\0\0\0\x09ab"), MAX_BYTES).is_err());
    }

    proptest! {
        #[test]
        fn decoding_is_total(tag in any::<u8>(), body in proptest::collection::vec(any::<u8>(), 0..80)) {
            let _ = decode(&mut frame(tag, &body), MAX_BYTES);
            let mut raw = BytesMut::from(body.as_slice());
            while let Ok(Some(_)) = decode(&mut raw, 1 << 16) {}
        }
    }
}
