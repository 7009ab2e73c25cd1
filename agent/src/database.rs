//! How the agent logs in to the database beside it.

use agent_api::ApiError;
use agent_sql::{ConnectOptions, Password};

use crate::config::Config;
use crate::facts::os_user;

/// Where and as whom to log in. The password is read from its file now.
///
/// # Errors
/// [`agent_api::ErrorKind::Database`] if the password file cannot be read.
pub fn connect_options(
    config: &Config,
    application_name: &str,
) -> Result<ConnectOptions, ApiError> {
    let password = config.pg_password()?;
    Ok(ConnectOptions {
        host: config.pg_host.clone(),
        port: config.pg_port(),
        user: config.pg_user.clone().unwrap_or_else(os_user),
        password: password.map(|password| Password::new(password.0)),
        application_name: application_name.to_owned(),
        ..ConnectOptions::default()
    })
}
